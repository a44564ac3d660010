"""The Python interface: what `vitrim.NAME` does with a network at hand, without Hydra.

`settings` builds a method from conf/method/ and from keywords. May import: pipeline and what is
below it, and OmegaConf, which reads conf/; not Hydra.
"""
