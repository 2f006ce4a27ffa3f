"""The watched model runs as before, whatever happens in it, and is left as it was."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import _len_torch_function_stack
from torch.utils.checkpoint import checkpoint

import entropy_monitor as em
from tests.hooks.test_zoo import built
from tests.zoo import ZOO
from tests.zoo.decoders import NanoBlock, NanoGPT


def ids(batch: int = 3, tokens: int = 11) -> torch.Tensor:
    return torch.randint(50, (batch, tokens))


def global_hooks() -> tuple[int, ...]:
    names = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_forward_hooks_always_called")
    return tuple(len(getattr(torch_module, name)) for name in names)


def attributes(model: nn.Module) -> list[set[str]]:
    return [set(vars(m)) | set(m._forward_hooks) | set(m._buffers) for m in model.modules()]


class Failing(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.inner, self.error = NanoGPT(True), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner(x)
        raise self.error("stop")


@pytest.mark.parametrize("name", ["nanogpt-sdpa", "mha-both-True", "hand-inplace", "swin"])
def test_leaves_nothing_behind(name: str) -> None:
    model, inputs = built(ZOO[name])
    before, keys, hooks = attributes(model), list(model.state_dict()), global_hooks()
    flag, state = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
    em.measure(model, *inputs)
    assert attributes(model) == before
    assert list(model.state_dict()) == keys
    assert global_hooks() == hooks
    assert torch.backends.mha.get_fastpath_enabled() == flag
    assert torch.equal(torch.get_rng_state(), state)
    assert _len_torch_function_stack() == 0


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_error_in_the_forward(error: type[BaseException]) -> None:
    model, x, hooks = Failing(error), ids(), global_hooks()
    with em.capture(model) as seen:
        for _ in range(2):  # an interrupt leaves the first forward without its closing hooks
            with pytest.raises(error):
                model(x)
        model.error = ValueError
        with pytest.raises(ValueError, match="stop"):
            model(x)
    assert seen.heads.rows_read.tolist() == [99] * 8
    assert _len_torch_function_stack() == 0
    assert global_hooks() == hooks


def test_gradients_and_outputs_are_bit_equal() -> None:
    model, x = NanoGPT(False, dropout=0.2).train(), ids()

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    with em.capture(model, rows=4):
        watched = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_forward_counts_once(reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = NanoBlock(True, 0.1), NanoBlock(False, 0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.b, checkpoint(self.a, x, use_reentrant=reentrant), use_reentrant=reentrant)

    model, x = Net(), torch.randn(2, 9, 32, requires_grad=True)
    torch.manual_seed(1)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    with em.capture(model) as seen:
        model(x).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
    assert set(seen.heads.rows_read) == {18}
    assert list(seen.heads.layer.unique()) == ["a.attn", "b.attn"]


def test_nested_captures_do_not_see_each_other() -> None:
    model, x = NanoGPT(False), ids()
    with em.capture(model) as outer, em.capture(model, maps=True) as inner, em.capture(model.h[1]) as part:
        model(x)
    alone = em.measure(model, x)
    for seen in (outer.heads, inner.heads):
        assert seen.equals(alone)
    assert list(part.heads.layer.unique()) == ["attn"]


def test_two_models_at_once() -> None:
    first, second = NanoGPT(True), NanoGPT(False)
    x = ids()
    with em.capture(first) as a, em.capture(second) as b:
        first(x)
        second(x)
        second(x)
    assert set(a.heads.rows_read) == {33}
    assert set(b.heads.rows_read) == {66}


def test_threads() -> None:
    model, x = NanoGPT(True), ids()

    def work() -> None:
        for _ in range(3):
            model(x)

    with em.capture(model) as seen:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(seen.heads.rows_read) == {9 * 33}


def test_copying_and_saving_while_watched() -> None:
    model, x = NanoGPT(True), ids()
    with em.capture(model) as seen:
        expected = model(x)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        torch.save(model, io.BytesIO())
        assert all(torch.equal(twin(x), expected) for twin in twins)  # not watched
    assert set(seen.heads.rows_read) == {33}


def test_keeps_no_activation_alive() -> None:
    model, inputs = built(ZOO["hand-inplace"])
    outputs: list[weakref.ref[torch.Tensor]] = []
    for m in model.modules():
        m.register_forward_hook(lambda m, a, out: outputs.append(weakref.ref(out)))
    with torch.no_grad(), em.capture(model):
        model(*inputs)
        assert len(outputs) == 4
        assert not any(reference() is not None for reference in outputs)


def test_compiled_parts_are_read_with_the_others() -> None:
    x, model = ids(), NanoGPT(True)
    expected, table = model(x), em.measure(model, x)
    model.h[0] = torch.compile(model.h[0], backend="eager")
    with em.capture(model) as seen:
        assert torch.equal(model(x), expected)
    assert seen.heads[["layer", "call", "head"]].equals(table[["layer", "call", "head"]])
    torch.testing.assert_close(
        torch.tensor(seen.heads.entropy.to_numpy()), torch.tensor(table.entropy.to_numpy())
    )
    torch.compiler.reset()


def test_a_compiled_model_that_lets_nothing_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As under a version of torch whose insides are others."""
    monkeypatch.setattr("entropy_monitor.hooks.compiled.switch.available", lambda: False)
    model = NanoGPT(True)
    model.compile(backend="eager")
    monkeypatch.setattr("entropy_monitor.options.compiled_code_is_read", lambda: False)
    with pytest.raises(
        em.errors.ConfigurationError, match=r"NanoGPT.* is compiled, and this version of torch"
    ):
        em.EntropyMonitor(model, run_dir=tmp_path / "run")
    torch.compiler.reset()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrappers_leave_names_alone(prefix: str) -> None:
    wrapper = nn.Module()
    setattr(wrapper, prefix[:-1], NanoGPT(True))
    wrapper.forward = lambda x: getattr(wrapper, prefix[:-1])(x)
    assert list(em.measure(wrapper, ids()).layer.unique()) == ["h.0.attn", "h.1.attn"]


def test_modes_are_bit_equal_in_figures() -> None:
    for name in ("nanogpt-sdpa", "hand-inplace", "weights-adapter", "hand-fairseq", "llama-kv2-repeat-half"):
        model, inputs = built(ZOO[name])
        expected = em.measure(model, *inputs)
        with torch.inference_mode(), em.capture(model) as seen:
            model(*inputs)
        torch.testing.assert_close(
            torch.tensor(seen.heads.select_dtypes("number").to_numpy(), dtype=torch.float64),
            torch.tensor(expected.select_dtypes("number").to_numpy(), dtype=torch.float64),
            rtol=0,
            atol=1e-6,
            equal_nan=True,
        )
