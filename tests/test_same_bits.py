"""Six short runs have the losses of commit 68a78e2, and its bits on the same machine."""

import json
import math
from pathlib import Path

import pytest
from same_bits import RUNS, differences, has_commit, of_commit, of_tree, train_all

from training.train import main

ROOT = Path(__file__).parent.parent
COMMIT = "68a78e2"
EXPECTED = json.loads(Path(__file__).with_name("same_bits.json").read_text())
# Bits differ between processors, so losses are compared. fp16 rounds to 11 bits: one rounding is 5e-4.
TOLERANCE = dict.fromkeys(RUNS, 1e-5) | {"fp16": 5e-4}


@pytest.fixture(scope="module")
def digests(tmp_path_factory, processes) -> dict[str, dict]:
    """The digests of this tree's runs."""

    def start(arguments: list[str], n_ranks: int) -> None:
        if n_ranks == 1:
            assert main(arguments) == 0
        else:
            ended = processes.run("training.train:main", *arguments, n_ranks=n_ranks)
            assert ended.returncode == 0, ended.stderr

    return train_all(tmp_path_factory.mktemp("same_bits"), start)


@pytest.mark.parametrize("name", RUNS)
def test_losses_equal_those_of_68a78e2(digests, name):
    """`python tests/same_bits.py record tests/same_bits.json --at 68a78e2` wrote the expected values."""
    ours, theirs = digests[name]["rows"], EXPECTED[name]["rows"]
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    assert digests[name]["tensors"].keys() == EXPECTED[name]["tensors"].keys()
    for one, other in zip(ours, theirs, strict=True):
        for key in ("step", "loss", "val_loss", "val_bits_per_byte", "learning_rate", "skipped_steps"):
            if key in other:
                assert math.isclose(one[key], other[key], rel_tol=TOLERANCE[name]), (one["step"], key)
        assert math.isclose(one["grad_norm"], other["grad_norm"], rel_tol=10 * TOLERANCE[name]), one["step"]


@pytest.mark.soak
@pytest.mark.skipif(not has_commit(COMMIT), reason=f"the clone has no commit {COMMIT}")
def test_all_bits_equal_those_of_68a78e2():
    assert differences(of_tree(ROOT), of_commit(COMMIT)) == []
