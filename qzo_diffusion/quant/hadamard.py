"""Rotations by randomized Hadamard matrices of any size, as QuaRot has them (arXiv 2404.00456).

A Hadamard matrix of size n has entries of ±1 / √n, so that one large input becomes n small ones.
Random signs before it keep inputs that are alike from adding up. Sylvester's matrices have sizes
that are powers of two, and Paley's the sizes q + 1 and 2 (q + 1) for primes q. Products of both
give all widths of common models. A width without such a product takes a cosine transform (DCT-II)
for its odd part, whose entries are up to √2 times as large."""

import math

import torch
from torch import Tensor

from qzo_diffusion.quant.kronecker import KroneckerMap

LARGEST_PALEY = 512
SEED = 0  # of the signs


def hadamard_map(size: int) -> KroneckerMap:
    """The randomized rotation of `size` numbers: always the same one."""
    generator = torch.Generator().manual_seed(SEED)
    signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    left, power = _odd_factor(size)
    right = 1
    while power > 1:  # two factors of about the same size cost least
        if len(left) < right:
            left = torch.kron(left, sylvester(2))
        else:
            right *= 2
        power //= 2
    return KroneckerMap(signs, left, sylvester(right))


def sylvester(size: int) -> Tensor:
    """The orthogonal matrix of a size that is a power of two, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix, two)
    return matrix / math.sqrt(size)


def _odd_factor(size: int) -> tuple[Tensor, int]:
    """An orthogonal matrix whose size divides `size`, and the power of two that is left."""
    power = size & -size
    odd = size // power
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64), power
    twos = 1
    while twos <= power and odd * twos <= LARGEST_PALEY:
        if (found := paley(odd * twos)) is not None:
            return found, power // twos
        twos *= 2
    return cosines(odd), power


def paley(size: int) -> Tensor | None:
    """Paley's orthogonal matrix, float64; None where neither construction has this size."""
    if _is_prime(size - 1) and (size - 1) % 4 == 3:
        return (torch.eye(size, dtype=torch.float64) + _bordered(size - 1)) / math.sqrt(size)
    half = size // 2
    if size % 2 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        whole = torch.kron(_bordered(half - 1), plus)
        return (whole + torch.kron(torch.eye(half, dtype=torch.float64), minus)) / math.sqrt(size)
    return None


def cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, float64."""
    rows = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (rows.unsqueeze(0) + 0.5) * rows.unsqueeze(1))
    matrix *= math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _bordered(prime: int) -> Tensor:
    """Paley's matrix of quadratic residues of differences, with a border: [prime + 1, prime + 1].

    It is symmetric for primes of the form 4k + 1, and skew otherwise.
    """
    squares = {number * number % prime for number in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if n in squares else -1.0 for n in range(1, prime)])
    places = torch.arange(prime)
    found = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    found[1:, 1:] = character[(places.unsqueeze(1) - places) % prime].double()
    found[0, 1:] = 1
    found[1:, 0] = 1 if prime % 4 == 1 else -1
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % other for other in range(2, math.isqrt(number) + 1))
