"""What --exhaustive selects and what --strict-skips makes of skips, on small test files."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SKIPS = """
import pytest

def test_at_run_time():
    pytest.skip({0!r})

@pytest.mark.skipif(True, reason={0!r})
def test_by_mark():
    pass

@pytest.fixture
def needed():
    pytest.skip({0!r})

def test_by_fixture(needed):
    pass
"""
MODULE = "import pytest\npytest.skip({0!r}, allow_module_level=True)\n"
ABSENT = "import pytest\npytest.importorskip('no_such_module_anywhere')\n"
STRICT = ("--strict-skips", "-p", "no:cacheprovider")


@pytest.fixture(autouse=True)
def plugin(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())


def test_without_the_option_a_skip_is_a_skip(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SKIPS.format("no thanks"))
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(skipped=3)


def test_a_skip_that_could_be_cured_names_test_and_reason(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SKIPS.format("no thanks"))
    done = pytester.runpytest_inprocess(*STRICT)
    done.assert_outcomes(failed=1, errors=2)  # marks and fixtures skip before the call
    for name in ("at_run_time", "by_mark", "by_fixture"):
        done.stdout.fnmatch_lines([f"*.py::test_{name}: skipped under --strict-skips: no thanks"])


@pytest.mark.parametrize("text", [MODULE.format("no thanks"), ABSENT])
def test_a_module_that_skips_is_an_error(text: str, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(text)
    done = pytester.runpytest_inprocess(*STRICT)
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*.py: skipped under --strict-skips: *"])


@pytest.mark.parametrize(
    "reason",
    [
        "nothing to run",
        "this processor has no avx512_bf16, avx512_vbmi2",
        "this processor has no AMX",
        "mounting a tmpfs needs root: mount: permission denied.\ndmesg may know more",
    ],
)
def test_what_no_set_up_cures_stays_a_skip(reason: str, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SKIPS.format(reason))
    done = pytester.runpytest_inprocess(*STRICT)
    done.assert_outcomes(skipped=3)
    done.stdout.fnmatch_lines(["skipped: 3 for *"])


def test_a_missing_program_excuses_its_own_tests_only(pytester: pytest.Pytester) -> None:
    browser = "Chromium is not installed (Debian package chromium)"
    monitoring = "Debian's package prometheus is not installed"
    for name, reason in (("of_a_browser", browser), ("of_metrics", monitoring)):
        pytester.makepyfile(**{f"test_{name}": MODULE.format(reason)})
    pytester.runpytest_inprocess(*STRICT).assert_outcomes(errors=2)
    done = pytester.runpytest_inprocess(*STRICT, "--missing", "chromium")
    done.assert_outcomes(skipped=1, errors=1)
    done.stdout.fnmatch_lines(
        ["skipped: 1 for no chromium", "NOT TESTED, could not be installed: chromium"]
    )
    done = pytester.runpytest_inprocess(*STRICT, "--missing", "chromium,prometheus")
    done.assert_outcomes(skipped=2)


def test_an_unknown_program_is_refused(pytester: pytest.Pytester) -> None:
    done = pytester.runpytest_inprocess(*STRICT, "--missing", "chromum")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*--missing: no such program: chromum"])


def test_an_expected_failure_is_no_skip(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.xfail\ndef test_it():\n    assert False\n")
    pytester.runpytest_inprocess(*STRICT).assert_outcomes(xfailed=1)


def test_it_holds_in_the_processes_of_xdist(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SKIPS.format("no thanks"), test_page=SKIPS.format("nothing to run"))
    done = pytester.runpytest_subprocess(*STRICT, "-n", "1", "-p", "xdist")
    done.assert_outcomes(failed=1, errors=2, skipped=3)
    done.stdout.fnmatch_lines(["skipped: 3 for a page without commands"])


def test_exhaustive_tests_run_when_asked_for(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers = exhaustive")
    pytester.makepyfile(
        """
        import pytest

        def test_short():
            pass

        @pytest.mark.exhaustive
        def test_long():
            pass
        """
    )
    plain = ("-p", "no:cacheprovider")
    found = pytester.runpytest_inprocess(*plain)
    found.assert_outcomes(passed=1, deselected=1)
    assert "without the tests marked exhaustive" in found.stdout.str()
    pytester.runpytest_inprocess("--exhaustive", *plain).assert_outcomes(passed=2)
