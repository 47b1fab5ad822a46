import pytest

from swin_dense.datasets.convert_findings import MAX_LISTED, Findings, listed_values
from swin_dense.errors import ConfigError, DataError, ImageError


def test_findings_keep_every_data_error_and_go_on():
    findings = Findings()
    for number in range(3):
        with findings.collected():
            raise ImageError(f"file {number}")
    with pytest.raises(DataError, match=r"^source: nothing was written; 3 faults:\n  file 0\n  file 1\n  file 2$"):
        findings.require_none("source")


def test_findings_list_up_to_a_bound_and_say_how_many_more():
    findings = Findings()
    findings.faults = [f"fault {number}." for number in range(MAX_LISTED + 7)]
    with pytest.raises(DataError) as error:
        findings.require_none("source")
    lines = str(error.value).splitlines()
    assert len(lines) == MAX_LISTED + 2 and lines[-1] == "  and 7 more"


def test_findings_without_faults_let_pass_and_foreign_errors_go_through():
    findings = Findings()
    findings.notes["left out"] += 1
    findings.require_none("source")
    with pytest.raises(ConfigError), findings.collected():
        raise ConfigError("a setting")


def test_listed_values_are_cut_and_counted():
    assert listed_values(["a", "b"]) == "a, b"
    assert listed_values([str(number) for number in range(7)], 3) == "0, 1, 2 and 4 more"
