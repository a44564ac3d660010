"""Passes over images that the processes of a run share out: each adds up some of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments, MomentsError, key_of
from vitrim.jobs import distributed
from vitrim.trainer.phase import ResumePoint


class Share:
    """The parts of one pass that this process takes in, until the sums of all are summed.

    Process r of n takes in the parts r, r + n, r + 2n and so on. Every process also takes in the
    first part, whose mean `Moments` subtract from all rows, but only process 0 keeps its sums. So
    each part adds what it adds in one process alone, and the totals are equal but for the rounding
    of float64. A process may have no part.

    Until `among` is called, this process takes in all parts.

    Args:
        module: what holds the sums: all `Moments` in it, and the buffers named by `sums`.
        sums: names of its float64 buffers (`vitrim.closed_form.moments.add_to`).
    """

    rank = 0
    processes = 1

    def __init__(self, module: nn.Module, sums: Sequence[str] = ()) -> None:
        self._module = module
        self._names = [*sums]
        self._n_parts = 0
        self._failure: tuple[int, str] | None = None
        self._is_reduced = False

    def among(self, rank: int, processes: int) -> None:
        """Share the pass, before it begins: every process then calls all of the other methods."""
        self.rank, self.processes = rank, processes

    def take(self, take_in: Callable[[], None]) -> bool:
        """Call `take_in`, which adds the next part of the pass, if that is this process's.

        Among several processes a MomentsError of `take_in` is not raised here, where the others
        would wait for this one, but by `reduce`. Returns whether `take_in` was called.
        """
        part = self._n_parts
        self._n_parts += 1
        if self.processes == 1:
            take_in()
            return True
        if self._failure is not None or (part and part % self.processes != self.rank):
            return False
        try:
            take_in()
        except MomentsError as error:
            self._failure = (part, str(error))
        if part == 0 and self.rank != 0:
            for total in self._totals():
                total.zero_()
        return True

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum over the processes, once: all then have the same bits.

        Raises:
            MomentsError: in every process, if one could not take in a part; that of the first such
                part.
        """
        if self.processes == 1 or not self._n_parts or self._is_reduced:
            return
        self._is_reduced = True
        failures = [each for each in distributed.gathered(self._failure) if each is not None]
        first = distributed.broadcast((min(failures, default=None),))[0]
        if first is not None:
            raise MomentsError(first[1])
        for total in self._totals():
            total.copy_(distributed.summed(total))
        for moments in self._moments():
            if moments.shift is not None:
                own = moments.shift if self.rank == 0 else torch.zeros_like(moments.shift)
                moments.shift.copy_(distributed.summed(own))

    def measured(
        self, measure: Callable[[Sequence[int]], Sequence[float]], n: int, device: torch.device
    ) -> list[float]:
        """Return n measured numbers, of which each process measures some.

        Args:
            measure: returns the numbers at the given positions, which may be none.
            n: how many there are.
            device: on which processes can exchange tensors.
        """
        own = range(self.rank, n, self.processes)
        found = measure(own)
        if self.processes == 1:
            return [*found]
        of_all = torch.zeros(n, dtype=torch.float64, device=device)
        of_all[own.start :: own.step] = torch.tensor(found, dtype=torch.float64, device=device)
        numbers: list[float] = distributed.summed(of_all).tolist()
        return numbers

    def _moments(self) -> Iterator[Moments]:
        return (each for each in self._module.modules() if isinstance(each, Moments))

    def _totals(self) -> Iterator[Tensor]:
        """Iterate over all sums, float64, in the same order in every process."""
        for name in self._names:
            total = self._module.get_buffer(key_of(name))
            if total.numel():  # all processes have added the first part to it, or none
                yield total
        for moments in self._moments():
            yield from moments.sums()


class SharedPass(LightningModule):
    """A scorer that trains nothing and adds up statistics of images: its processes share them out.

    Every process is shown all images, so that their places in the pass are known, and ends with
    the same sums.
    """

    resumes_at: ResumePoint = "never"
    clip_norm = 0.0
    trains = False

    net: nn.Module
    shares: Sequence[Share] = ()
    """One for each pass over the images."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def on_train_start(self) -> None:
        """Run the network in evaluation mode, in which it is used."""
        self.net.eval()

    def configure_optimizers(self) -> None:
        """Return none: nothing is trained."""

    def on_train_batch_end(self, outputs: object, batch: object, batch_index: int) -> None:
        """Add what waits, so that sums do not depend on which batch comes next."""
        for module in self.modules():
            if isinstance(module, Moments):
                module.flush()

    def share_out(self, rank: int, processes: int) -> None:
        """Share the passes among processes, each of which runs this phase on the same images."""
        for share in self.shares:
            share.among(rank, processes)
