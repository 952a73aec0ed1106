import time

import pytest
import torch
from lab_shared.bench import environment, measure


def test_measure_times_the_calls_it_says():
    calls = []
    timing = measure(lambda: (calls.append(0), time.sleep(0.002)), repeats=5, warmup=2)
    assert len(calls) == 7
    assert timing["repeats"] == 5
    assert timing["median_s"] >= 0.002
    assert timing["iqr_s"] >= 0
    with pytest.raises(ValueError, match="repeats=0"):
        measure(lambda: None, repeats=0)


@pytest.mark.gpu
def test_measure_sees_work_queued_on_the_device():
    x = torch.randn(8192, 8192, device="cuda")
    assert measure(lambda: x @ x, repeats=3, device="cuda")["median_s"] > 1e-3


def test_environment_names_what_a_figure_depends_on(tmp_path):
    record = environment(repository=tmp_path)
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["device"]
    assert record["git"] is None
