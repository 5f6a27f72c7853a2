"""What a YAML parser complains about, in words for the writer of a recipe."""

from __future__ import annotations

from ruamel.yaml.error import MarkedYAMLError

QUOTE = "put the value in quotes"
RULES = (
    ("character '\\t'", "a tab stands where spaces belong", "indent with spaces"),
    ("mapping values are not allowed", "a colon stands where no key can be",
     "check the indentation; put a value that holds ': ' in quotes"),
    ("could not find expected ':'", "this line is no `key: value`", "write a colon and a space after the key"),
    ("but got '<stream end>'", "a bracket is never closed", "close the [ or {{ of line {opened}"),
    ("expected ',' or", "a comma or a closing bracket is missing", "check the [ or {{ of line {opened}"),
    ("'<stream end>'", "the recipe ends in the middle of something", "close the [, {{ or quote that is still open"),
    ("<block end>", "this line does not fit what begins in line {opened}",
     "give the entries of one list or map the same indentation"),
    ("unexpected end of stream", "a quote is never closed", "close the quote of line {opened}"),
    ("unknown escape", "a backslash in double quotes begins no known escape", "use single quotes, or write \\\\"),
    ("sequence entries are not allowed", "a list item cannot begin here", "put '- ' on a line of its own"),
    ("did not find expected digit", "an escape in double quotes is not complete", "use single quotes, or write \\\\"),
    ("undefined alias", "recipes have no aliases", "write the value out"),
    ("found undefined tag", "recipes have no tags", "write the value alone"),
    ("incompatible YAML", "recipes are YAML 1.2", "take the %YAML line out"),
)  # fmt: skip


def explain(error: MarkedYAMLError, text: str) -> tuple[str, str]:
    """What is wrong, and the fix."""
    said = " ".join(part for part in (error.problem, error.context) if part)
    opened = error.context_mark.line + 1 if error.context_mark else 1
    for part, what, fix in RULES:
        if part in said:
            return what.format(opened=opened), fix.format(opened=opened)
    if "cannot start any token" in said and error.problem_mark:
        character = text[error.problem_mark.index : error.problem_mark.index + 1]
        return f"a value cannot begin with {character}", f"{QUOTE}: '{character}…'"
    return f"this is not YAML: {error.problem or error.context}", "check quotes, brackets and indentation here"
