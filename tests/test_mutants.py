import subprocess
import sys
from collections import Counter

import pytest

from tests import mutants


@pytest.mark.parametrize("op", mutants.TESTS)
def test_every_mutant_still_applies(op):
    source = (mutants.ROOT / f"kernels/{op}.py").read_text()
    for mutant in mutants.MUTANTS:
        if mutant.op == op:
            assert mutant.apply(source) != source


def test_every_kernel_has_the_three_faults():
    faults = Counter((m.op, m.fault) for m in mutants.MUTANTS)
    for op in mutants.TESTS:
        assert min(faults[op, fault] for fault in ("mask", "row", "scale")) >= 2  # both directions


def test_a_text_that_is_gone_is_reported():
    mutant = mutants.Mutant("layer_norm", "_sum_partials_kernel", "mask", "not there", "")
    with pytest.raises(ValueError, match="must hold 'not there' once, holds it 0 times"):
        mutant.apply((mutants.ROOT / mutant.file).read_text())


def test_a_process_that_tests_a_copy_begins_without_the_original():
    code = "import sys, tests.mutants; sys.exit('kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=mutants.ROOT).returncode == 0


@pytest.mark.slow
def test_every_mutant_is_killed():
    assert mutants.main([]) == 0
