"""Which lane and register holds which matrix element. Lane l has group = l / 4 and t = l % 4 (PTX ISA,
matrix fragments).

Fragments are arrays (registers, warps, 32) of 32-bit words; matrices are (warps, rows, columns) float32.
"""

from __future__ import annotations

import numpy as np


def halves(words: np.ndarray, bf16: bool) -> np.ndarray:
    """uint32 words (…) -> their two 16-bit floats as float32 (…, 2), low half first."""
    if not bf16:
        return words.view(np.float16).reshape(*words.shape, 2).astype(np.float32)
    pair = np.empty((*words.shape, 2), np.uint32)
    np.left_shift(words, np.uint32(16), out=pair[..., 0])
    np.bitwise_and(words, np.uint32(0xFFFF0000), out=pair[..., 1])
    return pair.view(np.float32)


def matrix_a(words: np.ndarray, bf16: bool) -> np.ndarray:
    """A of m16n8k(8n): registers (2n, warps, 32) -> (warps, 16, 8n).

    Register i of lane (group, t): row group + 8 (i % 2), columns k = 2t + 8 (i / 2) and k + 1.
    """
    blocks, warps = len(words) // 2, words.shape[1]
    values = halves(words, bf16).reshape(blocks, 2, warps, 8, 4, 2)
    return np.ascontiguousarray(values.transpose(2, 1, 3, 0, 4, 5)).reshape(warps, 16, 8 * blocks)


def matrix_a_bytes(words: np.ndarray) -> np.ndarray:
    """A of k = 16n 8-bit elements: registers (2n, warps, 32) -> (warps, 16, 16n) uint8.

    Register i of lane (group, t): row group + 8 (i % 2), columns k = 4t + 16 (i / 2) to k + 3.
    """
    blocks, warps = len(words) // 2, words.shape[1]
    values = words.view(np.uint8).reshape(blocks, 2, warps, 8, 4, 4)
    return np.ascontiguousarray(values.transpose(2, 1, 3, 0, 4, 5)).reshape(warps, 16, 16 * blocks)


def matrix_b(words: np.ndarray, bf16: bool, count: int) -> np.ndarray:
    """`count` matrices B side by side, transposed: registers (count * n, warps, 32) -> (warps, 8 * count,
    8n).

    Register i of lane (group, t): column group, rows k = 2t + 8i and k + 1.
    """
    blocks, warps = len(words) // count, words.shape[1]
    values = halves(words, bf16).reshape(count, blocks, warps, 8, 4, 2)
    return np.ascontiguousarray(values.transpose(2, 0, 3, 1, 4, 5)).reshape(warps, 8 * count, 8 * blocks)


def registers_d(matrix: np.ndarray) -> np.ndarray:
    """C or D matrices side by side: (warps, 16, 8 * count) -> registers (count * 4, warps, 32).

    Register i of lane (group, t): row group + 8 (i / 2 % 2), column 8 (i / 4) + 2t + i % 2. A warp's 16 rows
    of a wgmma's D lie the same way.
    """
    warps, count = len(matrix), matrix.shape[2] // 8
    parts = matrix.reshape(warps, 2, 8, count, 4, 2)
    return np.ascontiguousarray(parts.transpose(3, 1, 5, 0, 2, 4)).reshape(4 * count, warps, 32)


def matrix_d(words: np.ndarray) -> np.ndarray:
    """The inverse of registers_d."""
    count, warps = len(words) // 4, words.shape[1]
    parts = words.reshape(count, 2, 2, warps, 8, 4).transpose(3, 1, 4, 0, 5, 2)
    return np.ascontiguousarray(parts).reshape(warps, 16, 8 * count)


def rows_to_lanes(rows: np.ndarray, transposed: bool) -> np.ndarray:
    """ldmatrix: 8x8 matrices of 16-bit elements as rows (warps, matrices, 8, 4 words) -> registers
    (matrices, warps, 32).

    Lane l gets row group, columns 2t and 2t + 1; transposed: column group, rows 2t and 2t + 1.
    """
    warps, count = rows.shape[:2]
    if transposed:
        elements = rows.view(np.uint16).reshape(warps, count, 8, 8)
        rows = np.ascontiguousarray(elements.swapaxes(2, 3)).view(np.uint32)
    return rows.reshape(warps, count, 32).swapaxes(0, 1)


def byte_rows_to_lanes(rows: np.ndarray) -> np.ndarray:
    """ldmatrix.m16n16.trans: 16x16 matrices of bytes as rows (warps, matrices, 16, 16) -> registers
    (2 * matrices, warps, 32).

    Register i of lane (group, t): column group + 8 (i % 2), rows 4t to 4t + 3.
    """
    warps, count = rows.shape[:2]
    parts = rows.reshape(warps, count, 4, 4, 2, 8).transpose(1, 4, 0, 5, 2, 3)
    return np.ascontiguousarray(parts).view(np.uint32).reshape(2 * count, warps, 32)


def lanes_to_byte_rows(registers: np.ndarray) -> np.ndarray:
    """stmatrix.m16n8.trans: registers (matrices, warps, 32) -> rows in memory (warps, matrices, 8, 4 words).

    Byte i of lane (group, t) goes to row 2t + i % 2, byte group + 8 (i / 2).
    """
    count, warps = registers.shape[:2]
    parts = registers.view(np.uint8).reshape(count, warps, 8, 4, 2, 2).transpose(1, 0, 3, 5, 4, 2)
    return np.ascontiguousarray(parts).reshape(warps, count, 8, 16).view(np.uint32)


def lanes_to_rows(registers: np.ndarray, transposed: bool) -> np.ndarray:
    """stmatrix: the inverse of rows_to_lanes."""
    count, warps = registers.shape[:2]
    rows = np.ascontiguousarray(registers.swapaxes(0, 1)).reshape(warps, count, 8, 4)
    if transposed:
        elements = rows.view(np.uint16).reshape(warps, count, 8, 8)
        rows = np.ascontiguousarray(elements.swapaxes(2, 3)).view(np.uint32).reshape(warps, count, 8, 4)
    return rows
