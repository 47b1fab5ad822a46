import os

import pytest

from swin_dense.tools import benchmark_memory
from swin_dense.tools.benchmark_memory import TouchedDataset, measure_file, measure_memory, memory_parts, pss_bytes
from swin_dense.tools.main import parse

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs /proc/PID/smaps_rollup")


def test_memory_of_a_process_grows_with_what_it_touches():
    before = pss_bytes(os.getpid())
    block = bytearray(os.urandom(2**26))  # so large that no memory of former tests is used again
    assert 0.9 * 2**26 < pss_bytes(os.getpid()) - before < 1.5 * 2**26
    assert len(block) == 2**26


def test_data_set_is_what_a_large_file_takes_beyond_a_small_one(monkeypatch, capsys):
    def figures(num_images, num_annotations, counts):
        base = 100.0 if num_images == 64 else 300.0
        return {method: {str(count): base + 10 * count for count in counts} for method in ("fork", "spawn")}

    monkeypatch.setattr(benchmark_memory, "measure_file", figures)
    measured = measure_memory(parse(["benchmark", "data", "--memory", "--workers", "8", "1"]))
    assert measured["fork"]["8"] == {"all": 380.0, "with_64_images": 180.0, "data_set": 200.0}
    assert "1.00 times as much with 8 workers as with 1" in capsys.readouterr().out
    page = "\n".join(memory_parts(measured))
    assert "| 8 workers | 380 | 180 | 200 |" in page and "1.00 times as much with 8 workers as with 1." in page
    assert "started by fork" in page and "started by spawn" in page


def test_every_image_is_looked_up_and_some_are_loaded():
    class Recorder:
        image_ids, sizes_hw = range(17), range(17)

        def __init__(self):
            self.looked_up, self.loaded = [], []

        def __len__(self):
            return 17

        def __getitem__(self, index):
            self.loaded.append(index)

        def image_path(self, index):
            self.looked_up.append(index)

    recorder = Recorder()
    assert TouchedDataset(recorder)[1] == os.getpid()
    assert recorder.looked_up == list(range(17)) and recorder.loaded == list(range(1, 17, 2))


@pytest.mark.slow
def test_workers_are_counted():
    figures = measure_file(64, 64, [1, 2])
    for mib in figures.values():
        assert 0 < mib["1"] < mib["2"]
