"""The defects of `make mutants` can be planted, and their tests exist."""

from mutants import misplaced


def test_every_defect_has_its_text_and_its_test():
    assert misplaced() == []
