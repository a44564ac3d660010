"""Marked functions compute where they are told, and nothing else changes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from second_device import CPU, SECOND, SecondDevice
from vitrim.network.computing import computing_device, computing_on, on_device


class Pair(NamedTuple):
    """Two results."""

    square: Tensor
    by_name: dict[str, Tensor]


@on_device
def product(parts: Mapping[str, Tensor], more: list[Tensor], *, scale: float) -> Pair:
    """Return products of what is in containers."""
    found = parts["a"] @ parts["a"] * scale
    return Pair(found, {"product": parts["a"] @ more[0]})


def given() -> tuple[dict[str, Tensor], list[Tensor]]:
    return {"a": torch.randn(5, 5)}, [torch.randn(5, 5)]


def test_containers_go_there_and_results_come_back() -> None:
    arguments = given()
    expected = product(*arguments, scale=2.0)
    with SecondDevice() as device, computing_on(SECOND):
        found = product(*arguments, scale=2.0)
        assert isinstance(found, Pair)
        assert (found.square.device, found.by_name["product"].device) == (CPU, CPU)
    assert [each.device for each in device.products] == [SECOND, SECOND]
    assert torch.equal(found.square, expected.square)
    assert torch.equal(found.by_name["product"], expected.by_name["product"])


def test_by_default_everything_is_computed_where_it_lies() -> None:
    arguments = given()
    with SecondDevice() as device:
        there = {"a": arguments[0]["a"].to(SECOND)}, [arguments[1][0].to(SECOND)]
        assert product(*there, scale=2.0).square.device == SECOND
        product(*arguments, scale=2.0)
    assert [each.device for each in device.products] == [SECOND, SECOND, CPU, CPU]


def test_tensors_without_numbers_stay() -> None:
    empty = torch.empty(5, 5, device="meta")
    with computing_on(CPU):
        on_meta = product({"a": empty}, [empty], scale=2.0)
    assert on_meta.square.is_meta


def test_the_innermost_context_counts_and_each_ends() -> None:
    assert computing_device() is None
    with computing_on(SECOND):
        with computing_on(CPU):
            assert computing_device() == CPU
        with computing_on(torch.device("mps")):
            assert computing_device() is None  # it has no float64
        with pytest.raises(ValueError, match="ends"), computing_on(CPU):
            raise ValueError("ends")
        assert computing_device() == SECOND
    assert computing_device() is None


def test_a_thread_has_a_context_of_its_own() -> None:
    entered, left = threading.Event(), threading.Event()
    seen: list[torch.device | None] = []

    def work() -> None:
        seen.append(computing_device())
        with computing_on(torch.device("cuda", 1)):
            entered.set()
            left.wait(10)
            seen.append(computing_device())

    with computing_on(SECOND):
        thread = threading.Thread(target=work)
        thread.start()
        entered.wait(10)
        seen.append(computing_device())
        left.set()
        thread.join()
    assert seen == [None, SECOND, torch.device("cuda", 1)]


def test_without_memory_there_it_is_computed_here(caplog: pytest.LogCaptureFixture) -> None:
    arguments = given()
    expected = product(*arguments, scale=2.0)
    with SecondDevice() as device, computing_on(SECOND):
        device.fails = True
        with caplog.at_level(logging.WARNING):
            found = product(*arguments, scale=2.0)
        assert computing_device() == SECOND
    assert [each.device for each in device.products] == [SECOND, CPU, CPU]
    assert torch.equal(found.square, expected.square)
    assert "product: too little memory on lazy:0, computed on cpu" in caplog.text


def test_products_there_are_in_full_precision() -> None:
    @on_device
    def precision(x: Tensor) -> tuple[Tensor, str]:
        return x @ x, torch.get_float32_matmul_precision()

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with SecondDevice(), computing_on(SECOND):
            assert precision(torch.ones(2, 2))[1] == "highest"
        assert precision(torch.ones(2, 2))[1] == "high"
    finally:
        torch.set_float32_matmul_precision(before)
