"""Values kept between inference passes never belong to other weights than the module's own."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from hpc_xvr.model.folding import Folding


class Doubling(Folding):
    """Twice its weight, folded where that is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.made = 0

    def forward(self) -> Tensor:
        kept = self.folded("twice", (self.weight,), self._make)
        return 2 * self.weight if kept is None else kept

    def _make(self) -> Tensor:
        self.made += 1
        return 2 * self.weight


@pytest.fixture
def module():
    return Doubling().eval()


@pytest.fixture
def settled(module):
    """After its first inference pass."""
    with torch.inference_mode():
        module()
    assert module.made == 1
    return module


def check(module, weight, made, mode=torch.inference_mode):
    """The next passes give twice `weight`, and values have been made `made` times by then."""
    with mode():
        for _ in range(2):
            assert torch.equal(module(), torch.full((3,), 2.0 * weight, dtype=module.weight.dtype))
    assert module.made == made


def test_values_are_made_once_for_many_passes(settled):
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        check(settled, 1, made=1, mode=mode)


def test_a_module_in_training_or_with_gradients_keeps_nothing(module):
    check(module.train(), 1, made=0)
    check(module, 1, made=0, mode=torch.enable_grad)
    check(module, 1, made=0)  # not until eval() is called
    check(module.eval(), 1, made=1)
    module().sum().backward()
    check(module, 1, made=1)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda m: m.load_state_dict({"weight": torch.full((3,), 5.0)}), id="load"),
        pytest.param(
            lambda m: m.load_state_dict({"weight": torch.full((3,), 5.0)}, assign=True), id="assign"
        ),
        pytest.param(
            lambda m: nn.ModuleList([m]).load_state_dict({"0.weight": torch.full((3,), 5.0)}),
            id="load-parent",
        ),
        pytest.param(lambda m: nn.init.constant_(m.weight, 5), id="no_grad"),
        pytest.param(lambda m: torch.inference_mode()(m.weight.fill_)(5), id="inference_mode"),
        pytest.param(lambda m: torch._foreach_add_([m.weight.detach()], 4), id="foreach"),
        pytest.param(
            lambda m: setattr(m, "weight", nn.Parameter(torch.full((3,), 5.0))), id="another"
        ),
        pytest.param(lambda m: (m.weight.data.fill_(5), m.eval()), id="data-then-eval"),
        pytest.param(
            lambda m: (m.weight.detach().numpy().fill(5), m.train(), m.eval()), id="numpy-then-eval"
        ),
        pytest.param(lambda m: m.double().weight.data.fill_(5), id="to"),
        pytest.param(lambda m: (nn.ModuleList([m]).double(), m.weight.data.fill_(5)), id="parent"),
    ],
)
def test_whatever_changes_a_weight_is_followed(settled, write):
    write(settled)
    check(settled, 5, made=2)


@pytest.mark.parametrize(
    "event",
    [
        lambda m: m.train(),
        lambda m: m.eval(),
        lambda m: m.float(),
        lambda m: m.load_state_dict(m.state_dict()),
    ],
)
def test_what_was_kept_is_let_go_at_once(module, event):
    with torch.inference_mode():
        kept = weakref.ref(module())
    assert kept() is not None
    event(module)
    assert kept() is None


def test_averaged_weights_put_in_for_a_pass_are_not_mixed_up(settled):
    """As validation does it: the average is written in place between validations."""
    average = {"weight": torch.full((3,), 3.0)}
    with torch.inference_mode():
        assert torch.equal(functional_call(settled, average), torch.full((3,), 6.0))
        assert torch.equal(functional_call(settled, average), torch.full((3,), 6.0))
        assert settled.made == 2
    check(settled, 1, made=3)
    settled.train()
    average["weight"].data.fill_(4)
    settled.eval()
    with torch.inference_mode():
        assert torch.equal(functional_call(settled, average), torch.full((3,), 8.0))


@pytest.mark.parametrize("look", ["before", "between"])
def test_a_fused_optimizer_in_eval_mode_is_followed(settled, look):
    """It writes without leaving a trace; a pass without gradients just before it must not count."""
    optimizer = torch.optim.SGD(settled.parameters(), 1.0, fused=True)
    loss = settled().sum()
    if look == "before":
        check(settled, 1, made=1)
    loss.backward()
    if look == "between":
        check(settled, 1, made=1)
    optimizer.step()
    optimizer.zero_grad()
    check(settled, -1, made=1)
    check(settled.eval(), -1, made=2)


def test_a_step_that_is_still_to_come_is_waited_for(module):
    optimizer = torch.optim.SGD(module.parameters(), 1.0, fused=True)
    module.train()
    module().sum().backward()
    module.eval()
    check(module, 1, made=0)
    optimizer.step()
    check(module, -1, made=0)
    optimizer.zero_grad()
    check(module, -1, made=1)


def test_weights_made_in_inference_mode_are_read_anew():
    """Torch does not count writes to them."""
    with torch.inference_mode():
        module = Doubling().eval()
        module()
        module.weight.fill_(5)
    check(module, 5, made=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_begin_empty(settled, copied):
    other = copied(settled)
    other.weight.data.fill_(5)
    check(other, 5, made=2)
    check(settled, 1, made=1)


def test_nothing_is_kept_while_compiling(settled):
    compiled = torch.compile(settled, backend="eager", fullgraph=True)
    settled.weight.data.fill_(5)
    with torch.inference_mode():
        assert torch.equal(compiled(), torch.full((3,), 10.0))
