"""What tests ask of fresh interpreters is answered by fresh ones."""

import os

import pytest


def test_nothing_of_ours_is_there_and_nothing_stays(fresh_interpreters):
    script = "import os, sys; print([name for name in sys.modules if 'dilated' in name], os.environ.get('ASKED'))"
    assert fresh_interpreters.run(script, ASKED="yes") == "[] yes\n"
    assert fresh_interpreters.run("import dilated_attention_pytorch") == ""
    assert fresh_interpreters.run(script) == "[] None\n"
    assert "ASKED" not in os.environ


@pytest.mark.parametrize("script", ["assert 1 == 2, 'one is not two'", "import os; os.write(1, b'two'); os.abort()"])
def test_a_script_that_fails_is_noticed(fresh_interpreters, script):
    with pytest.raises(AssertionError, match="two"):
        fresh_interpreters.run(script)
