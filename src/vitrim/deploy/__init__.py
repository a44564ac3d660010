"""A saved network on its way to use: run folders, exports, model cards, int8, latency.

`runfolder` reads the files of a run, `saved` its network; `export`, `formats` and `static_int8`
write the network for other programs, with `card`; `compact` is the architecture by which timm loads
it; `quantize` makes it int8; `bench` and `engine` time it; `table` writes tables, `pictures`
images.

May import: store, measure, network, data, jobs and what is below them.
"""
