"""Compiled: entries of the margins that are solved together, and the factors of their forms where forms are many."""

from __future__ import annotations

from typing import Any

import numpy as np

from convex_head.kernels.compiled import Compact, Few, Lanes, Setting, Tables, inner
from convex_head.kernels.factors import factor_one
from convex_head.kernels.tiles import STEP


@inner
def gather_lanes(
    wanted: np.ndarray, stage: Any, labels: np.ndarray, start: int, tables: Tables, place: np.ndarray, few: Any
) -> Lanes:
    """Lanes of the entries with wanted == stage; place (2 T,) is zero before and after."""
    rows, columns = wanted.shape
    found, number = np.empty(min(len(place), wanted.size), np.int64), 0
    for i in range(rows):
        label = labels[start + i]
        for k in range(columns):
            if wanted[i, k] == stage:
                key = 2 * tables.form[label, k] + tables.negative[label, k]
                if place[key] == 0:
                    found[number] = key
                    number += 1
                place[key] += 1
    keys = found[:number].copy()
    first = np.zeros(number + 1, np.int64)
    for index in range(number):
        first[index + 1] = first[index] + (place[keys[index]] + STEP - 1) // STEP * STEP
        place[keys[index]] = first[index]
    row, column = np.empty(first[-1], np.int64), np.empty(first[-1], np.int64)
    for i in range(rows):
        label = labels[start + i]
        for k in range(columns):
            if wanted[i, k] == stage:
                key = 2 * tables.form[label, k] + tables.negative[label, k]
                row[place[key]], column[place[key]] = i, k
                place[key] += 1
    for index in range(number):
        for l in range(place[keys[index]], first[index + 1]):
            row[l], column[l] = row[first[index]], -1
        place[keys[index]] = 0
    slots = keys // 2 if few is None else np.arange(number)
    return Lanes(keys, slots, first, row, column)


@inner
def factored(net: Compact, lanes: Lanes, setting: Setting, few: Few) -> tuple[Compact, Any, Any, Any]:
    """The network with factors of the forms of the lanes, their Z, and zeros for the sums in their bases."""
    number, size = len(lanes.keys), net.lift.shape[1]
    local = Compact(
        net.offsets,
        net.twice,
        net.linear,
        net.base,
        net.root,
        net.plus,
        net.minus,
        np.zeros(number, np.int64),
        np.zeros((number, size), net.lift.dtype),
        np.zeros((number, size, size), net.lift.dtype),
        np.zeros((number, size, size), net.lift.dtype),
        net.curvature,
    )
    combination, in_basis = np.zeros((number, size, size)), np.zeros((number, size, size))
    spread = np.zeros((number, size))
    member = np.empty(len(few.gram), np.int64)
    for slot in range(number):
        form = lanes.keys[slot] // 2
        factor_one(few.gram, few.beta, few.a, setting.features, local, combination, form, slot, member)
    return local, combination, in_basis, spread
