"""All bad inputs, in the order of the table."""

from __future__ import annotations

from tests.bad_inputs._command_cases import COMMAND_CASES
from tests.bad_inputs._core_cases import CORE_CASES
from tests.bad_inputs._reading_cases import READING_CASES
from tests.bad_inputs._saving_cases import SAVING_CASES
from tests.bad_inputs._tool_cases import TOOL_CASES
from tests.bad_inputs._training_cases import TRAINING_CASES
from tests.bad_inputs.case import Case, numbered

CASES: list[Case] = numbered([*TRAINING_CASES, *READING_CASES, *SAVING_CASES, *CORE_CASES, *TOOL_CASES, *COMMAND_CASES])
