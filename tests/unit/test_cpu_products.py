"""fp32 products by oneDNN against the same in fp64."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from launcher.model import cpu_products
from launcher.model.cpu_products import align_weights, linear, outer, use_fast_products

_CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Whatever the processor and however small, products are oneDNN's in blocks of 16 rows and more; the shapes of what
    it was given."""
    seen: list[tuple[int, ...]] = []
    plain = cpu_products._by_onednn

    def noted(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(tuple(rows.shape))
        return plain(rows, weight, bias)

    monkeypatch.setattr(cpu_products, "is_faster", lambda: True)
    monkeypatch.setattr(cpu_products, "_SMALLEST", 1)
    monkeypatch.setattr(cpu_products, "_SMALLEST_BLOCK", 16)
    monkeypatch.setattr(cpu_products, "_NARROWEST", 1)
    monkeypatch.setattr(cpu_products, "_by_onednn", noted)
    return seen


def is_close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> bool:
    return bool((found.double() - expected).abs().max() <= tolerance * expected.abs().max())


def gradients(layer: nn.Linear, given: Tensor, weights: Tensor) -> list[Tensor]:
    output = layer(given)
    wanted = [given, *(p for p in layer.parameters() if p.requires_grad)]
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), wanted)]


@pytest.mark.parametrize("shape", [(1, 37, 50), (2, 3, 41, 50), (64, 50), (16, 50), (15, 50)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_layer_and_its_gradients_are_those_of_fp64(
    shapes: list[tuple[int, ...]], shape: tuple[int, ...], has_bias: bool, is_frozen: bool
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
    assert bool(shapes) == (given.numel() >= 16 * 50)


def test_strides_of_every_kind_are_taken(shapes: list[tuple[int, ...]]) -> None:
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
        # A sum of 2,100 equal numbers rounds in one direction.
        assert all(is_close(*pair, 2e-5) for pair in zip(found, expected, strict=True))
    a, b = torch.randn(700, 900)[:, 100:400], torch.randn(700, 900)[:, 5:405]
    assert is_close(outer(a, b), a.t().double() @ b.double())
    assert is_close(linear(a, b[:300, :300]), a.double() @ b[:300, :300].t().double())
    assert is_close(
        linear(a.t().contiguous().t(), b[:300].contiguous()[:, :300].t()), a.double() @ b[:300, :300].double()
    )
    assert time.monotonic() - started < 20
    assert shapes


def test_few_shapes_are_met_whatever_the_number_of_rows(shapes: list[tuple[int, ...]]) -> None:
    """oneDNN keeps code for each: memory grew by gigabytes with lengths that it had not met before."""
    layer = nn.Linear(40, 24)
    use_fast_products(layer, _CPU)
    for num_rows in range(1, 300):
        layer(torch.randn(num_rows, 40, requires_grad=True)).sum().backward()
    # Rows of 16 to 256; the gradient of the weight has one shape, and as many sums.
    assert {rows for rows, width in shapes if width == 40} == {16, 32, 64, 128, 256}
    assert {width for rows, width in shapes if rows == 24} <= {16, 32, 64, 128, 256, 24, 40}
    assert len(set(shapes)) <= 15


def test_models_keep_what_is_theirs(shapes: list[tuple[int, ...]]) -> None:
    """Names, copies, precision of autocast, layers with a forward pass of their own."""

    class Own(nn.Linear):
        def forward(self, given: Tensor) -> Tensor:
            return given.new_zeros(())

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8))
    names = list(model.state_dict())
    use_fast_products(model, _CPU)
    assert list(model.state_dict()) == names
    assert not model(torch.randn(40, 8))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.zero_()
        other[0].bias.zero_()
    assert not other[0](torch.randn(40, 8)).any() and model[0](torch.randn(40, 8)).any()
    num_calls = len(shapes)
    assert num_calls
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[0](torch.randn(40, 8)).dtype == torch.bfloat16
    assert model.to(torch.bfloat16)[0](torch.randn(40, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert len(shapes) == num_calls


def test_other_devices_keep_their_own() -> None:
    layer = nn.Linear(8, 8)
    use_fast_products(layer, torch.device("cuda"))
    assert "forward" not in vars(layer)


def test_layers_share_one_compilation_for_all_lengths(shapes: list[tuple[int, ...]]) -> None:
    """More of them than the compiler's limit of 8, beyond which it would leave the rest as they are, in silence."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(30, 20, bias=True) for _ in range(12))
    exact = copy.deepcopy(layers).double()
    use_fast_products(layers, _CPU)
    for layer in layers:
        layer.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    for length in (7, 51, 519):
        shapes.clear()
        for layer, its_exact in zip(layers, exact, strict=True):
            given, weight = torch.randn(2, length, 30, requires_grad=True), torch.randn(2, length, 20)
            found = gradients(layer, given, weight)
            expected = gradients(its_exact, given.detach().double().requires_grad_(), weight.double())
            assert all(is_close(*pair) for pair in zip(found, expected, strict=True))
        assert (2 * length >= 16) == bool(shapes), "its blocks are those of the length that it has"
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_compiled_layers_multiply_as_ever_where_it_is_not_faster(shapes: list[tuple[int, ...]]) -> None:
    layer = nn.Linear(30, 20)
    use_fast_products(layer, _CPU)
    layer.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(40, 30)).dtype == torch.bfloat16
    assert layer.to(torch.bfloat16)(torch.randn(40, 30, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert not shapes


def test_same_bits_at_every_call() -> None:
    torch.manual_seed(0)
    layer, given = nn.Linear(300, 500), torch.randn(200, 300, requires_grad=True)
    use_fast_products(layer, _CPU)
    first = gradients(layer, given, torch.ones(200, 500))
    for _ in range(5):
        assert all(a.equal(b) for a, b in zip(gradients(layer, given, torch.ones(200, 500)), first, strict=True))


def test_what_a_layer_gives_may_be_changed_in_place() -> None:
    """OLMo clamps its queries, Gemma 3n scales its inputs."""
    torch.manual_seed(0)
    layer = nn.Linear(50, 33)
    exact = copy.deepcopy(layer).double()
    use_fast_products(layer, _CPU)
    given = torch.randn(2, 20, 50, requires_grad=True)
    found = torch.autograd.grad(layer(given).clamp_(-0.5, 0.5).mul_(3.0).square().sum(), [given, layer.weight])
    wide = given.detach().double().requires_grad_()
    expected = torch.autograd.grad((3.0 * exact(wide).clamp(-0.5, 0.5)).square().sum(), [wide, exact.weight])
    assert all(is_close(*pair, 1e-5) for pair in zip(found, expected, strict=True))


def test_biases_of_every_kind_are_taken() -> None:
    torch.manual_seed(0)
    given, weight = torch.randn(40, 50), torch.randn(33, 50)
    for bias in (torch.randn(66)[::2], torch.zeros(1).expand(33), torch.randn(1), torch.randn(1, 33), torch.randn(33)):
        assert is_close(
            linear(given, weight, bias), nn.functional.linear(given.double(), weight.double(), bias.double())
        )


def test_layer_is_called_and_refuses_as_torchs_own() -> None:
    layer = nn.Linear(50, 33)
    use_fast_products(layer, _CPU)
    assert layer(input=torch.randn(40, 50)).shape == (40, 33)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        layer(torch.randn(40, 49))


@pytest.mark.parametrize("only_trained", [False, True])
def test_weights_begin_where_torchs_own_do(only_trained: bool) -> None:
    memory = torch.randn(10_000)
    layer = nn.Linear(50, 33)
    layer.weight.data, layer.bias.data = memory[2:1652].view(33, 50), memory[1701:1734]
    layer.bias.requires_grad_(False)
    layer.register_buffer("more", memory[1803:1900])
    layer.register_buffer("sparse", torch.eye(3).to_sparse(), persistent=False)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weight, bias = layer.weight, layer.bias
    align_weights(layer, _CPU, only_trained=only_trained)
    assert layer.weight is weight and layer.bias is bias, "an optimizer may have them already"
    assert weight.data_ptr() % 64 == 0 and (bias.data_ptr() % 64 == 0) == (not only_trained)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
