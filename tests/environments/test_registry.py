import pytest

from sqap import environments
from sqap.errors import InputError


def test_default_tasks_are_known_and_distinct():
    tasks = environments.default_tasks("metaworld")
    environments.check_tasks("metaworld", tasks)
    assert len(tasks) == 12


@pytest.mark.parametrize(
    "ask",
    [
        lambda env: environments.make(env, "door-open"),
        lambda env: environments.check_tasks(env, ["door-open"]),
        environments.default_tasks,
        environments.action_units,
    ],
)
def test_an_unknown_environment_is_refused_with_the_known_ones(ask):
    with pytest.raises(InputError, match="unknown environment 'libera'; known environments: metaworld"):
        ask("libera")


@pytest.mark.parametrize(
    "ask",
    [
        lambda task: environments.make("metaworld", task),
        lambda task: environments.check_tasks("metaworld", ["door-open", task]),
    ],
)
def test_an_unknown_task_is_refused_with_the_known_ones(ask):
    with pytest.raises(
        InputError, match=r"unknown metaworld task 'door-opne'; known tasks: .*door-open.*window-open"
    ):
        ask("door-opne")


def test_no_tasks_are_refused():
    with pytest.raises(InputError, match="no tasks are named"):
        environments.check_tasks("metaworld", [])


def test_a_task_named_twice_is_refused():
    with pytest.raises(InputError, match="'door-open' is named more than once"):
        environments.check_tasks("metaworld", ["door-open", "door-close", "door-open"])
