"""Threads with one core each leave the caller's number of threads alone."""

import threading

import pytest
import torch
from fastcon.workers import workers


def test_every_worker_computes_on_one_core_and_the_caller_on_all():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = threading.Barrier(3)

        def look(_: int) -> tuple[int, str]:
            together.wait(10)
            return torch.get_num_threads(), threading.current_thread().name

        with workers(3) as pool:
            seen = list(pool.map(look, range(3)))
            assert torch.get_num_threads() == 2
        assert [count for count, _ in seen] == [1, 1, 1]
        assert len({name for _, name in seen}) == 3
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [2]  # threads that start afterwards get the caller's number
    finally:
        torch.set_num_threads(before)


def test_an_error_at_once_leaves_no_noise(caplog):
    for _ in range(60):
        with pytest.raises(ValueError, match="at once"), workers(3):
            raise ValueError("at once")
    assert not caplog.records
