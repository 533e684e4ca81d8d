"""fp32 products by oneDNN against the same in fp64."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from launcher.model import cpu_products
from launcher.model.cpu_attention import attend
from launcher.model.cpu_products import batched_product, product, use_fast_products

_CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Whatever the processor and however small, products are oneDNN's; the shapes of what it was given."""
    seen: list[tuple[int, ...]] = []
    plain = cpu_products._linear

    def noted(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling():
            seen.append(tuple(given.shape))
        return plain(given, weight, bias)

    monkeypatch.setattr(cpu_products, "is_faster", lambda: True)
    monkeypatch.setattr(cpu_products, "_SMALLEST", 1)
    monkeypatch.setattr(cpu_products, "_NARROWEST", 1)
    monkeypatch.setattr(cpu_products, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(cpu_products, "_linear", noted)
    yield seen


def is_close(found: Tensor, expected: Tensor) -> bool:
    return bool((found.double() - expected).abs().max() <= 2e-6 * expected.abs().max())


def gradients(layer: nn.Linear, given: Tensor, weights: Tensor) -> list[Tensor]:
    output = layer(given)
    wanted = [given, *(p for p in layer.parameters() if p.requires_grad)]
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), wanted)]


@pytest.mark.parametrize("shape", [(1, 37, 50), (2, 3, 41, 50), (64, 50), (1, 50)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_layer_and_its_gradients_are_those_of_fp64(
    calls: list[tuple[int, ...]], shape: tuple[int, ...], has_bias: bool, is_frozen: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(50, 33, bias=has_bias)
    layer.weight.requires_grad_(not is_frozen)
    exact = copy.deepcopy(layer).double()
    given, weights = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 33)
    use_fast_products(layer, _CPU)
    found = gradients(layer, given, weights)
    expected = gradients(exact, given.detach().double().requires_grad_(), weights.double())
    assert all(is_close(*pair) for pair in zip(found, expected, strict=True))
    assert len(calls) == 3 - is_frozen


def test_strides_of_every_kind_are_taken(calls: list[tuple[int, ...]]) -> None:
    """oneDNN's kernel for a slice of columns takes minutes."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 80)
    exact = copy.deepcopy(layer).double()
    use_fast_products(layer, _CPU)
    wide = torch.randn(3, 700, 300)
    started = time.monotonic()
    for given in (wide[:, :, 100:196], wide.transpose(1, 2)[:, :, :96], torch.randn(1, 1, 96).expand(3, 700, 96)):
        given = given.requires_grad_()
        found = torch.autograd.grad(layer(given).sum(), [given, layer.weight])  # a gradient of one number
        other = given.detach().double().requires_grad_()
        expected = torch.autograd.grad(exact(other).sum(), [other, exact.weight])
        assert all(is_close(*pair) for pair in zip(found, expected, strict=True))
    a, b = torch.randn(700, 900)[:, 100:400], torch.randn(300, 900)[:, 5:405]
    assert is_close(product(a, b), a.double() @ b.double())
    assert is_close(product(a.t().contiguous().t(), b.contiguous()), a.double() @ b.double())
    assert time.monotonic() - started < 20
    assert calls


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_batched_products_are_those_of_fp64(calls: list[tuple[int, ...]], scale: float) -> None:
    a, b = torch.randn(3, 40, 16), torch.randn(3, 50, 16)
    assert is_close(batched_product(a, b.transpose(1, 2), scale), scale * (a.double() @ b.double().transpose(1, 2)))
    assert is_close(batched_product(a.transpose(1, 2), a), a.double().transpose(1, 2) @ a.double())
    assert len(calls) == 6
    found = batched_product(a.bfloat16(), b.bfloat16().transpose(1, 2), scale)
    assert found.dtype == torch.bfloat16 and len(calls) == 6


def test_attention_is_the_same(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shapes = [(2, 300, heads, 16) for heads in (6, 2, 2)]
    tensors = [torch.randn(shape).transpose(1, 2).requires_grad_() for shape in shapes]

    def found() -> list[Tensor]:
        output, _ = attend(nn.Module(), *tensors, None, softcap=2.0, sliding_window=170)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), tensors)]

    ours = found()
    assert calls
    monkeypatch.setattr(cpu_products, "is_faster", lambda: False)
    assert all(is_close(a, b.double()) for a, b in zip(ours, found(), strict=True))


def test_models_keep_what_is_theirs(calls: list[tuple[int, ...]]) -> None:
    """Names, copies, precision of autocast, layers with a forward pass of their own."""

    class Own(nn.Linear):
        def forward(self, given: Tensor) -> Tensor:
            return given.new_zeros(())

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8))
    names = list(model.state_dict())
    use_fast_products(model, _CPU)
    assert list(model.state_dict()) == names
    assert not model(torch.randn(4, 8))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.zero_()
        other[0].bias.zero_()
    assert not other[0](torch.randn(4, 8)).any() and model[0](torch.randn(4, 8)).any()
    num_calls = len(calls)
    assert num_calls == 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[0](torch.randn(4, 8)).dtype == torch.bfloat16
    assert model.to(torch.bfloat16)[0](torch.randn(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert len(calls) == num_calls


def test_other_devices_keep_their_own() -> None:
    layer = nn.Linear(8, 8)
    use_fast_products(layer, torch.device("cuda"))
    assert "forward" not in vars(layer)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_layers_multiply_this_way_too(calls: list[tuple[int, ...]]) -> None:
    """Traced whole, for any length; forward and backward."""
    torch.manual_seed(0)
    layer = nn.Linear(50, 33)
    exact = copy.deepcopy(layer).double()
    use_fast_products(layer, _CPU)
    layer.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    for length in (7, 19):
        given = torch.randn(1, length, 50, requires_grad=True)
        found = gradients(layer, given, torch.ones(1, length, 33))
        expected = gradients(exact, given.detach().double().requires_grad_(), torch.ones(1, length, 33).double())
        assert all(is_close(*pair) for pair in zip(found, expected, strict=True))
    assert len(calls) >= 6


def test_same_bits_at_every_call() -> None:
    torch.manual_seed(0)
    layer, given = nn.Linear(300, 500), torch.randn(200, 300, requires_grad=True)
    use_fast_products(layer, _CPU)
    first = gradients(layer, given, torch.ones(200, 500))
    for _ in range(5):
        assert all(a.equal(b) for a, b in zip(gradients(layer, given, torch.ones(200, 500)), first, strict=True))
