"""The distillation scaling law of arXiv 2502.08606: a student's loss from its size, its tokens and its teacher's loss.

Supervised:  L(N, D) = E + (A / N^a + B / D^b)^g
Distilled:   L_S = L_T + L_T^(-c0) (1 + (L_T / (L(N_S, D_S) d1))^(1 / f1))^(-c1 f1) (A' / N_S^a' + B' / D_S^b')^g'

N is parameters without embeddings, D is tokens, losses are in nats per token. The published coefficients (their Table
6, rounded) are for English web text with a vocabulary of 32,168.

Shapes: M rows (cells), P coefficients.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

TEACHER_TOKENS_PER_PARAMETER = 20.0  # their M_T: a teacher trained compute-optimally (Hoffmann et al., 2022)
PUBLISHED_ERROR = 0.01  # approximate relative error of a predicted loss, as they state it
PUBLISHED_SIZES, PUBLISHED_TOKENS = (143e6, 12.6e9), 512e9
LARGEST_RATIO = 1000.0  # of teacher to student, in the search for the best teacher
SMALLEST_F1 = 1e-3  # f1 is a divisor


@dataclass(frozen=True)
class Supervised:
    """Coefficients of the supervised law: E, A, B and the exponents a (size), b (tokens), g (outer)."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float
    gamma: float

    def loss(self, parameters, tokens):
        """Loss of a model trained alone, nats per token; floats or arrays.

        Args:
            parameters: number of parameters without embeddings.
            tokens: tokens of its training.
        """
        return self.e + (self.a / parameters**self.alpha + self.b / tokens**self.beta) ** self.gamma


@dataclass(frozen=True)
class Distilled:
    """Coefficients of the distilled law: A', B', a', b', g', and c0, c1, f1, d1 of the teacher's part."""

    a: float
    b: float
    alpha: float
    beta: float
    gamma: float
    c0: float
    c1: float
    f1: float
    d1: float

    def loss(self, parameters, tokens, teacher_loss, alone):
        """Loss of a distilled student, nats per token (their equation 8); floats or arrays.

        Args:
            parameters: the student's parameters without embeddings.
            tokens: tokens of the distillation.
            teacher_loss: the teacher's loss, nats per token.
            alone: loss of the same student on the same tokens without a teacher, nats per token.
        """
        ratio = (np.log(teacher_loss) - np.log(alone * self.d1)) / self.f1
        log_teacher = -self.c0 * np.log(teacher_loss) - self.c1 * self.f1 * np.logaddexp(0.0, ratio)
        own = (self.a / parameters**self.alpha + self.b / tokens**self.beta) ** self.gamma
        return teacher_loss + np.exp(log_teacher) * own


@dataclass(frozen=True)
class ScalingLaw:
    """Both laws together, which predict a loss from sizes."""

    supervised: Supervised
    distilled: Distilled

    def student_loss(self, student: float, tokens: float, teacher_loss):
        """Loss of a student of this size under a teacher of this loss, nats per token."""
        return self.distilled.loss(student, tokens, teacher_loss, self.supervised.loss(student, tokens))

    def teacher_loss(self, teacher, tokens_per_parameter: float = TEACHER_TOKENS_PER_PARAMETER):
        """Loss of a teacher of this size, trained alone on `tokens_per_parameter` tokens per parameter."""
        return self.supervised.loss(teacher, tokens_per_parameter * teacher)

    def loss_under(self, student: float, tokens: float, teacher, tokens_per_parameter: float):
        """Loss of a student under a teacher of this size."""
        return self.student_loss(student, tokens, self.teacher_loss(teacher, tokens_per_parameter))

    def best_teacher(
        self, student: float, tokens: float, tokens_per_parameter: float = TEACHER_TOKENS_PER_PARAMETER
    ) -> float | None:
        """Size of the teacher with the lowest student loss; None if it lies at an end of the range of 1 to 1,000 times
        the student's size."""

        def loss(log_ratio: float) -> float:
            return float(self.loss_under(student, tokens, student * np.exp(log_ratio), tokens_per_parameter))

        grid = np.linspace(0.0, np.log(LARGEST_RATIO), 200)
        best = int(np.argmin([loss(value) for value in grid]))
        if best in (0, len(grid) - 1):
            return None
        found = minimize_scalar(loss, bounds=(grid[best - 1], grid[best + 1]), method="bounded")
        return float(student * np.exp(found.x))


PUBLISHED = ScalingLaw(
    Supervised(e=1.220, a=3355.0, b=18186.0, alpha=0.408, beta=0.431, gamma=0.452),
    Distilled(a=2243.0, b=24181.0, alpha=0.321, beta=0.637, gamma=0.764, c0=2.549, c1=522.6, f1=0.090, d1=1.315),
)

# The fitted vectors, in order. Coefficients differ by decades, so those that are scales are fitted as logarithms.
SUPERVISED_NAMES = ("log_e", "log_a", "log_b", "alpha", "beta", "gamma")
DISTILLED_NAMES = ("log_a", "log_b", "alpha", "beta", "gamma", "c0", "c1", "f1", "log_d1")


def supervised_of(vector_P: np.ndarray) -> Supervised:
    """The coefficients of a fitted vector."""
    e, a, b = (float(value) for value in np.exp(vector_P[:3]))
    return Supervised(e, a, b, *(float(value) for value in vector_P[3:]))


def distilled_of(vector_P: np.ndarray) -> Distilled:
    """The coefficients of a fitted vector."""
    a, b = (float(value) for value in np.exp(vector_P[:2]))
    alpha, beta, gamma, c0, c1, f1 = (float(value) for value in vector_P[2:8])
    return Distilled(a, b, alpha, beta, gamma, c0, c1, max(f1, SMALLEST_F1), float(np.exp(vector_P[8])))


def supervised_gradient(vector_P: np.ndarray, log_n_M: np.ndarray, log_d_M: np.ndarray) -> tuple:
    """Supervised losses loss_M and their derivatives jacobian_PM with respect to the fitted vector."""
    floor = np.exp(vector_P[0])
    own_M, parts_5M = _power(vector_P[1:], log_n_M, log_d_M)
    return floor + own_M, np.concatenate([np.full((1, len(own_M)), floor), own_M * parts_5M])


def distilled_gradient(
    vector_P: np.ndarray, log_n_M: np.ndarray, log_d_M: np.ndarray, log_teacher_M: np.ndarray, log_alone_M: np.ndarray
) -> tuple:
    """Distilled losses loss_M and their derivatives jacobian_PM with respect to the fitted vector."""
    c0, c1, f1, log_d1 = vector_P[5:]
    f1 = max(f1, SMALLEST_F1)
    own_M, parts_5M = _power(vector_P[:5], log_n_M, log_d_M)
    ratio_M = (log_teacher_M - log_alone_M - log_d1) / f1
    soft_M, step_M = np.logaddexp(0.0, ratio_M), expit(ratio_M)
    above_M = np.exp(np.clip(-c0 * log_teacher_M - c1 * f1 * soft_M, -700.0, 700.0)) * own_M
    of_teacher_4M = np.stack([-log_teacher_M, -f1 * soft_M, c1 * (ratio_M * step_M - soft_M), c1 * step_M])
    return np.exp(log_teacher_M) + above_M, above_M * np.concatenate([parts_5M, of_teacher_4M])


def _power(vector_5: np.ndarray, log_n_M: np.ndarray, log_d_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(A / N^a + B / D^b)^g, and the derivatives of its logarithm with respect to log A, log B, a, b and g."""
    log_a, log_b, alpha, beta, gamma = vector_5
    size_M, token_M = log_a - alpha * log_n_M, log_b - beta * log_d_M
    log_sum_M = np.logaddexp(size_M, token_M)
    of_size_M, of_token_M = gamma * np.exp(size_M - log_sum_M), gamma * np.exp(token_M - log_sum_M)
    parts_5M = np.stack([of_size_M, of_token_M, -log_n_M * of_size_M, -log_d_M * of_token_M, log_sum_M])
    return np.exp(np.clip(gamma * log_sum_M, -700.0, 700.0)), parts_5M
