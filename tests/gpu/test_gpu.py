"""What only a GPU shows: float32 logits of bfloat16 products, and a resumed run to the bit."""

import pytest
import torch

from minima.batch import make_batch
from minima.losses import linear_distillation_loss, linear_token_log_probs
from minima.models.causal_lm import hidden_states, load_plain
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource
from tests.distributed.ranks import run_scenarios

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.2e-2)])
def test_the_loss_and_its_gradients_equal_float64(dtype, tolerance):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    student, head, teacher, teacher_head = normal(300, 64), normal(1001, 64), normal(300, 96), normal(1001, 96)
    labels = torch.randint(0, 1001, (300,), generator=generator, device="cuda")
    labels[::5] = -100
    student.requires_grad_(), head.requires_grad_()
    loss = linear_distillation_loss(student, head, teacher, teacher_head, labels, chunk_tokens=64)
    loss.total.backward()

    exact, exact_head = (tensor.detach().double().requires_grad_() for tensor in (student, head))
    keep = labels != -100
    log_p = (exact @ exact_head.T)[keep].log_softmax(-1)
    target = (teacher.double() @ teacher_head.double().T)[keep].softmax(-1)
    hard = torch.nn.functional.nll_loss(log_p, labels[keep], reduction="sum")
    wanted = 0.5 * hard - 0.5 * (target * log_p).sum()
    wanted.backward()
    torch.testing.assert_close(loss.total.double(), wanted, rtol=1e-5, atol=1e-4)
    for found, reference in ((student.grad, exact.grad), (head.grad, exact_head.grad)):
        assert (found.double() - reference).abs().max() / reference.abs().max() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.2e-2)])
def test_log_probabilities_and_their_gradients_equal_float64(dtype, tolerance):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator, device="cuda").to(dtype).requires_grad_()
    head = (torch.randn(1001, 64, generator=generator, device="cuda") * 0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, 1001, (300,), generator=generator, device="cuda")
    labels[::5] = -100
    above = torch.randn(300, generator=generator, device="cuda")
    found = linear_token_log_probs(hidden, head, labels, chunk_tokens=64)
    found.backward(above)

    exact, exact_head = (tensor.detach().double().requires_grad_() for tensor in (hidden, head))
    log_probs = (exact @ exact_head.T).log_softmax(-1).gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    wanted = log_probs * (labels != -100)
    wanted.backward(above.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    for gradient, reference in ((hidden.grad, exact.grad), (head.grad, exact_head.grad)):
        assert (gradient.double() - reference).abs().max() / reference.abs().max() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_packed_block_is_its_documents_alone(dtype, tolerance):
    shape = ModelShape(vocabulary_size=97, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4)
    model = load_plain(RandomSource(shape.to_config() | {"initializer_range": 0.2}, seed=1), dtype).to("cuda")
    tokens_BT = torch.randint(0, 97, (2, 64), generator=torch.Generator().manual_seed(0))
    documents_BT = torch.tensor([[0] * 20 + [1] * 44, [0] * 64])
    with torch.no_grad():
        packed = hidden_states(model, make_batch(tokens_BT, documents_BT=documents_BT).to(torch.device("cuda")))
        alone = [hidden_states(model, make_batch(piece[None].cuda())) for piece in tokens_BT[0].split([20, 44])]
    torch.testing.assert_close(packed[:1], torch.cat(alone, dim=1), rtol=tolerance, atol=tolerance)


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path):
    run = run_scenarios(["resume"], tmp_path, world_size=1, accelerator="cuda")["resume"]
    for precision in ("float32", "bfloat16"):
        assert run[precision]["resumed_weights"] == run[precision]["whole_weights"]
    assert "barrier" not in (tmp_path / "rank-0.log").read_text(), "its device was set, and needs no warning"
