"""Each mutant changes one place that is there; the slow script runs their tests."""

import mutants
import pytest


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.what)
def test_what_a_mutant_changes_is_there_once(mutant):
    assert (mutants.ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert (mutants.ROOT / "tests" / f"{mutant.test}.py").is_file()
