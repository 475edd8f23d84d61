"""The model against slow, obvious versions: attention, rotary positions, documents, cache, loss, start."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt.config import UserError, validate
from megagpt.documents import IGNORE
from megagpt.model import loss as loss_module
from megagpt.model.attention import attend, attention_mask
from megagpt.model.gpt import GPT, ModelConfig, initial_value, initialise, keep_products
from megagpt.model.loss import summed_cross_entropy, summed_loss_terms

SMALL = {"vocab_size": 50, "seq_len": 24, "num_layers": 2, "num_heads": 4, "hidden_size": 32}


def small(**changes: object) -> tuple[ModelConfig, GPT]:
    config = ModelConfig.model_validate({**SMALL, **changes})
    model = GPT(config)
    initialise(model, seed=3)
    return config, model.eval()


def ids(rows: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def obvious_logits(config: ModelConfig, model: GPT, tokens: Tensor) -> Tensor:
    """The llama family from its weights with explicit loops over heads and positions."""
    w = dict(model.named_parameters())

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def turn(x: Tensor, position: int) -> Tensor:
        half = config.head_width // 2
        angles = torch.tensor([position * config.rope_theta ** (-2 * i / config.head_width) for i in range(half)])
        first, second = x[:half], x[half:]
        return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])

    x = w["embedding.weight"][tokens]
    for layer in range(config.num_layers):
        p = f"blocks.{layer}."
        h = norm(x, w[p + "attention_norm.weight"])
        q, k, v = (h @ w[f"{p}attention.{name}.weight"].T for name in ("query", "key", "value"))
        if config.qkv_bias:
            q, k, v = (x + w[f"{p}attention.{n}.bias"] for x, n in ((q, "query"), (k, "key"), (v, "value")))
        out = torch.zeros(len(tokens), config.num_heads * config.head_width)
        size = config.head_width
        for head in range(config.num_heads):
            kv = head * config.kv_heads // config.num_heads
            queries = [turn(q[t, head * size : (head + 1) * size], t) for t in range(len(tokens))]
            keys = [turn(k[t, kv * size : (kv + 1) * size], t) for t in range(len(tokens))]
            for t in range(len(tokens)):
                scores = torch.stack([queries[t] @ keys[s] for s in range(t + 1)]) / size**0.5
                values = v[: t + 1, kv * size : (kv + 1) * size]
                out[t, head * size : (head + 1) * size] = scores.softmax(0) @ values
        x = x + out @ w[p + "attention.out.weight"].T
        h = norm(x, w[p + "mlp_norm.weight"])
        gate, up = h @ w[p + "mlp.gate.weight"].T, h @ w[p + "mlp.up.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[p + "mlp.out.weight"].T
    head_weight = w.get("head.weight", w["embedding.weight"])
    return norm(x, w["norm.weight"]) @ head_weight.T


@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 2}, {"tied_head": False}, {"head_size": 12, "num_kv_heads": 2}, {"qkv_bias": True}]
)
def test_llama_equals_the_obvious_computation(changes: dict[str, object]) -> None:
    config, model = small(**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        # fp32 sums in another order
        torch.testing.assert_close(model(ids()[:1, :9])[0], obvious_logits(config, model, ids()[0, :9]), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"family": "gpt2"}, {"num_kv_heads": 1, "qk_norm": True}])
def test_the_loss_is_torchs_summed_cross_entropy_and_so_are_its_gradients(changes: dict[str, object]) -> None:
    _, model = small(**changes)
    targets = ids(seed=1)
    targets[0, :7] = -100
    ours = model(ids(), targets)
    theirs = F.cross_entropy(model(ids()).flatten(0, 1), targets.flatten(), reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_label_smoothing_is_torchs_and_counts_in_training_only() -> None:
    _, model = small(label_smoothing=0.2, z_loss=0.1)
    targets = ids(seed=1)
    targets[0, :7] = -100
    evaluated = model(ids(), targets)
    model.train()
    logits = model(ids()).flatten(0, 1)
    counted = targets.flatten() != -100
    theirs = F.cross_entropy(logits, targets.flatten(), reduction="sum", label_smoothing=0.2)
    theirs = theirs + 0.1 * logits[counted].logsumexp(-1).square().sum()
    ours = model(ids(), targets)
    torch.testing.assert_close(ours, theirs)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    terms = model.loss_terms()
    assert terms["loss"].item() == evaluated.item(), "not one bit of the loss comes from smoothing"
    assert set(terms) == {"loss", "z_loss", "label_smoothing"}
    torch.testing.assert_close(sum(terms.values()), theirs.detach())


def test_chunks_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (37,), generator=generator)
    targets[5] = -100
    whole = summed_cross_entropy(hidden, weight, targets, z_loss=1e-2)
    grads = torch.autograd.grad(whole * 3, (hidden, weight))
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 50 * 10)
    chunked = summed_cross_entropy(hidden, weight, targets, z_loss=1e-2)
    torch.testing.assert_close(chunked, whole)
    for a, b in zip(torch.autograd.grad(chunked * 3, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    counted = targets != -100
    log_z = (hidden @ weight.T).logsumexp(-1)
    reference = F.cross_entropy(hidden @ weight.T, targets, reduction="sum") + 1e-2 * log_z[counted].square().sum()
    torch.testing.assert_close(whole, reference)
    for a, b in zip(torch.autograd.grad(reference * 3, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_hits_are_counted_without_gradients_in_chunks_and_only_where_a_target_counts() -> None:
    hidden, weight = torch.randn(30, 8), torch.randn(50, 8)
    likeliest = (hidden @ weight.T).argmax(-1)
    targets = likeliest.clone()
    targets[:7] = (likeliest[:7] + 1) % 50
    targets[7:10] = IGNORE
    for chunk_elements in (None, 50 * 4):
        with torch.no_grad():
            _, terms, _ = summed_loss_terms(hidden, weight, targets, chunk_elements=chunk_elements)
        assert terms["hits"].item() == 20
    assert summed_loss_terms(hidden, weight, targets)[1] == {}


def test_z_loss_counts_in_training_only() -> None:
    _, model = small(z_loss=0.1)
    with torch.no_grad():
        evaluated = float(model(ids(), ids(seed=1)))
        assert float(model.train()(ids(), ids(seed=1))) > evaluated + 1


def test_the_loss_is_told_apart_from_what_training_adds_to_it() -> None:
    _, plain = small()
    _, model = small(z_loss=0.1)
    model.load_state_dict(plain.state_dict())
    total, nats = model.train()(ids(), ids(seed=1)), plain.train()(ids(), ids(seed=1))
    terms = model.loss_terms()
    assert terms["loss"].item() == nats.item(), "not one bit of the loss comes from z_loss"
    log_z = plain.eval()(ids()).logsumexp(-1)
    torch.testing.assert_close(terms["z_loss"], 0.1 * log_z.square().sum(), rtol=1e-5, atol=0)  # fp32 sums in another order
    assert float(total.detach()) == float(terms["loss"] + terms["z_loss"])
    assert not any(term.requires_grad for term in terms.values())
    assert plain.loss_terms() == {}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_one_by_one_through_the_cache_give_the_same_logits(family: str) -> None:
    _, model = small(family=family)
    with torch.no_grad():
        whole = model(ids())
        cache = model.new_cache(num_slots=2)
        parts = [model(ids()[:, :10], cache=cache)]
        parts += [model(ids()[:, t : t + 1], cache=cache) for t in range(10, 24)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole[:, 9:], atol=1e-5, rtol=1e-5)  # the last token's only


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_document_in_a_sample_gives_what_it_gives_alone(family: str) -> None:
    _, model = small(family=family)
    lengths = torch.tensor([[10, 14, 0], [3, 3, 18]])
    with torch.no_grad():
        masked = model(ids(), doc_lengths=lengths)
        alone = model(ids()[:1, 10:])  # rotary positions are relative, learned ones count from the document's start
        torch.testing.assert_close(masked[:1, 10:], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(masked[1:, 6:], model(ids()[1:, 6:]), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(masked[:1, 10:], model(ids())[:1, 10:], atol=1e-3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_block_mask_allows_what_the_plain_mask_allows() -> None:
    """Flex attention has no backward pass on CPUs; its gradients are compared on a GPU, below."""
    generator = torch.Generator().manual_seed(0)
    q_bhte, lengths = torch.randn(2, 4, 200, 16, generator=generator), torch.tensor([[130, 70, 0], [1, 99, 100]])
    k_bkte, v_bkte = torch.randn(2, 2, 2, 200, 16, generator=generator)
    masks = [attention_mask(0, 200, lengths, q_bhte.device, blockwise=blockwise) for blockwise in (False, True)]
    plain, blocks = (attend(q_bhte, k_bkte, v_bkte, mask) for mask in masks)
    torch.testing.assert_close(plain, blocks, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"dropout=0\.1"):
        attend(q_bhte, k_bkte, v_bkte, masks[1], dropout=0.1)


@pytest.mark.parametrize("length", [64, 128, 200, 512, 640])
def test_blocks_from_the_ends_of_documents_are_those_of_every_pair(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    cuts = [sorted({0, length, *torch.randint(1, length, (count,), generator=generator).tolist()}) for count in (0, 1, 4, 40)]
    rows = [[b - a for a, b in itertools.pairwise(row)] for row in [*cuts, [0, 128, length] if length > 128 else [0, length]]]
    width = max(map(len, rows))
    lengths = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    found = attention_mask(0, length, lengths, lengths.device, blockwise=True)
    wanted = create_block_mask(found.mask_mod, len(rows), None, length, length, device="cpu")
    assert found.seq_lengths == wanted.seq_lengths
    assert found.BLOCK_SIZE == wanted.BLOCK_SIZE
    for kind in ("kv", "q", "full_kv", "full_q"):
        counts, numbers = getattr(found, f"{kind}_num_blocks"), getattr(found, f"{kind}_indices")
        assert torch.equal(counts, getattr(wanted, f"{kind}_num_blocks")), kind
        assert torch.equal(numbers, getattr(wanted, f"{kind}_indices")), kind
        assert counts.dtype == numbers.dtype == torch.int32


def test_no_array_over_all_pairs_is_made_for_documents() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.elements = max(self.elements, result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    lengths = torch.tensor([[1000, 3096], [4000, 96]])
    with Largest() as largest:
        attention_mask(0, 4096, lengths, lengths.device, blockwise=True)
    assert largest.elements == 2 * 4096  # each token's document


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_selective_checkpointing_keeps_attention_over_documents() -> None:
    lengths, x_bhte = torch.tensor([[130, 70]]), torch.randn(1, 2, 200, 16)
    mask = attention_mask(0, 200, lengths, x_bhte.device, blockwise=True)
    first_pass, _ = keep_products()
    with torch.no_grad(), first_pass:
        attend(x_bhte, x_bhte, x_bhte, mask)
    kept = [str(operation) for operation, results in first_pass.storage.items() if isinstance(results[0], tuple)]
    assert kept == ["flex_attention"], "the result of what is computed again is a mark"


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_documents_on_a_gpu_give_the_cpus_loss_and_gradients(compiled: bool) -> None:
    lengths, losses, gradients = torch.tensor([[10, 14, 0], [3, 3, 18]]), [], []
    for device in ("cpu", "cuda"):
        _, model = small()
        model.to(device)
        if compiled and device == "cuda":
            model.compile_blocks()
        loss = model(ids().to(device), ids(seed=1).to(device), lengths.to(device))
        loss.backward()
        losses.append(loss.detach().cpu())
        gradients.append([parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(losses[1], losses[0], atol=1e-3, rtol=1e-4)
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-2)


def test_the_start_depends_on_seed_and_name_only() -> None:
    config, model = small()
    _, again = small()
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, initial_value(config, name, a.shape, 3)), name
    other = GPT(config)
    initialise(other, seed=4)
    assert not torch.equal(other.embedding.weight, model.embedding.weight)
    values = initial_value(config, "blocks.0.mlp.out.weight", torch.Size((1000, 100)), 0)
    assert float(values.std()) == pytest.approx(0.02 / (2 * config.num_layers) ** 0.5, rel=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
def test_a_compiled_block_repeats_what_its_checkpoint_says_and_no_more() -> None:
    """Counted by torch's profiler: a forward pass of a block has 7 products, a backward pass 14."""
    from torch.profiler import profile

    products, attention, grads = [], [], []
    for every, selectively in ((0, False), (1, False), (1, True)):
        model = GPT(small()[0], checkpoint_every=every, checkpoint_selectively=selectively)
        initialise(model, seed=3)
        model.compile_blocks(backend="aot_eager_decomp_partition")  # the partition is the default backend's
        model(ids(), ids(seed=1)).backward()  # compiles
        model.zero_grad()
        with profile() as profiler:
            model(ids(), ids(seed=1)).backward()
        names = [event.name for event in profiler.events() or ()]
        products.append(names.count("aten::mm"))
        attention.append(names.count("aten::_scaled_dot_product_flash_attention_for_cpu"))
        grads.append([parameter.grad for parameter in model.parameters()])
    num_layers, of_the_head = small()[0].num_layers, 3
    assert products == [21 * num_layers + of_the_head, 27 * num_layers + of_the_head, 21 * num_layers + of_the_head]
    assert attention == [num_layers, 2 * num_layers, num_layers]
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])


def test_checkpointing_changes_no_gradient() -> None:
    config, _ = small(dropout=0.2)
    grads = []
    for every, selectively in ((0, False), (1, False), (2, False), (1, True)):
        model = GPT(config, checkpoint_every=every, checkpoint_selectively=selectively)
        initialise(model, seed=3)
        torch.manual_seed(0)
        model(ids(), ids(seed=1)).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            assert a is not None
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "hidden_size=32 is not a multiple of num_heads=5"),
        ({"head_size": 5}, "head size 5 is odd"),
        ({"family": "gpt2", "qkv_bias": True}, "qkv_bias is for family=llama"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"num_heads": 32}, "odd"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as raised:
        validate(ModelConfig, {**SMALL, **changes}, source="test")
    assert message in str(raised.value)


def test_too_long_a_sequence_is_refused() -> None:
    _, model = small()
    with pytest.raises(ValueError, match="25 tokens are more than seq_len=24"):
        model(ids(length=25))
    with pytest.raises(ValueError, match="targets beside a cache"):
        model(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long), cache=model.new_cache(1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler trips over warnings that are errors
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compiled_block_has_no_graph_break_and_the_same_loss(family: str) -> None:
    _, model = small(family=family)
    expected = model(ids(), ids(seed=1))
    for block in model.blocks:
        block.compile(fullgraph=True)  # a graph break would raise
    loss = model(ids(), ids(seed=1))
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
