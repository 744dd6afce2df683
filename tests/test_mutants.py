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


@pytest.mark.slow
def test_every_mutant_is_killed():
    assert mutants.main([]) == 0
