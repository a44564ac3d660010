"""DistributedDataParallel without the search for unused parameters in every step.

Which parameters a loss does not reach is found once, before the training: from the graph of what
the loss reads of the network for one image. They need no gradient then, as the classifier where
features are mimicked. Static graphs are not used: they change nothing where all parameters are
used, and do not work with gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from vitrim.jobs import distributed
from vitrim.trainer.phase import Phase, Reaches
from vitrim.trainer.shared_pass import SharedPass

SEARCHING = "ddp_find_unused_parameters_true"
"""Lightning's name of the strategy that looks for unused parameters in every step."""


def strategy_for(
    phase: Phase, chosen: object, *, epochs: int, image: Callable[[], Tensor]
) -> dict[str, object]:
    """Return the strategy for a phase, where `chosen` leaves it open and there are processes.

    A `SharedPass` is shared out among them, unless `chosen` is no DDP: sharded networks need all
    processes at every step. Its sums are those of each process: DDP must not send them around.

    Args:
        phase: that is to be run.
        chosen: `trainer.strategy`.
        epochs: of the phase; 0: it is not trained.
        image: returns a batch of one image (1, C, H, W).
    """
    if chosen not in ("ddp", "auto", SEARCHING) or distributed.place()[1] == 1:
        return {}
    if epochs and isinstance(phase, SharedPass):
        phase.share_out(*distributed.place())
        return {"strategy": DDPStrategy(broadcast_buffers=False)}
    if chosen == SEARCHING:
        return {}
    if not epochs or not isinstance(phase, Reaches):
        return {"strategy": SEARCHING} if chosen == "ddp" else {}
    return {"strategy": ReachedDDP(image)}


class ReachedDDP(DDPStrategy):
    """DDP of the parameters that the loss of a phase reaches (`Reaches`).

    Args:
        image: returns a batch of one image (1, C, H, W).
    """

    def __init__(self, image: Callable[[], Tensor]) -> None:
        super().__init__(find_unused_parameters=False)
        self._image = image
        self._unreached: list[nn.Parameter] = []

    def configure_ddp(self) -> None:
        """Wait until the phase has said, with its optimisers, what is trained."""

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Set up the optimisers, exclude what the loss does not reach, and wrap the phase."""
        super().setup_optimizers(trainer)
        phase = self.lightning_module
        assert isinstance(phase, Reaches)
        image = self._image().to(self.root_device)
        modes = {module: module.training for module in phase.modules()}
        phase.eval()
        with torch.enable_grad():
            reached = {id(parameter) for parameter in leaves_of(phase.outputs(image))}
        for module, training in modes.items():
            module.training = training
        trained = [parameter for parameter in phase.parameters() if parameter.requires_grad]
        self._unreached = [parameter for parameter in trained if id(parameter) not in reached]
        for parameter in self._unreached:
            parameter.requires_grad_(False)
        super().configure_ddp()

    def teardown(self) -> None:
        """Make what was excluded trainable again."""
        for parameter in self._unreached:
            parameter.requires_grad_()
        super().teardown()


def leaves_of(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """Iterate over the tensors whose gradients the gradients of `outputs` would give.

    >>> a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
    >>> [leaf is a for leaf in leaves_of([2 * a])]
    [True]
    """
    nodes = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = {*nodes}
    while nodes:
        node = nodes.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            yield variable
        further = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= further
        nodes += further
