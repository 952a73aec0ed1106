import subprocess
import sys

import numpy as np
import pytest
import torch
from lab_shared.memory import DeviceMemoryError, lower_when_full, peak_memory

MESSAGE = (
    "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1.2 GiB is free. "
    "Process 7 has 2 GiB memory in use."
)


def test_the_flags_are_named():
    @lower_when_full("--batch-size", "--model.d-model")
    def train():
        raise torch.OutOfMemoryError(MESSAGE)

    for _ in range(2):  # a decorated function can be called again
        with pytest.raises(DeviceMemoryError, match=r"3\.00 GiB.*lower --batch-size or --model\.d-model$") as caught:
            train()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert "Process 7" not in str(caught.value)


@pytest.mark.parametrize("fill", [lambda: torch.empty(10**15), lambda: np.empty(10**15)], ids=["torch", "numpy"])
def test_a_machine_that_is_really_full(fill):
    with pytest.raises(DeviceMemoryError, match=r"^the machine is out of memory \(.*llocate.*lower --batch-size$"):
        lower_when_full("--batch-size")(fill)()


def test_other_errors_and_results_pass():
    with pytest.raises(RuntimeError, match=r"^else$"), lower_when_full("--x"):
        raise RuntimeError("else")
    assert lower_when_full("--x")(lambda: 3)() == 3


@pytest.mark.gpu
def test_a_gpu_that_is_really_full():
    with (
        pytest.raises(DeviceMemoryError, match=r"Tried to allocate.*--tokens-per-batch"),
        lower_when_full("--tokens-per-batch"),
    ):
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")


def test_peak_memory_is_this_process_alone():
    ballast = np.ones(40_000_000)  # a parent larger than its child
    assert peak_memory() > ballast.nbytes
    program = "from lab_shared.memory import peak_memory; import numpy as np; before = peak_memory()\n"
    program += "np.ones(30_000_000); print(before, peak_memory())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, child.stdout.split())
    assert 0.9 * 240e6 < after - before < 1.2 * 240e6
