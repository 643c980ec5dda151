"""Sphinx extension: the bibliography is printed with the survey's own numbers.

The label of `s100_xiao2024streaming` is "100", as in the survey; every other entry is labelled with its
`shorthand`. Entries are sorted by survey number, the others follow by label.
"""
import re

from pybtex.plugin import register_plugin
from pybtex.style.formatting.unsrt import Style as Unsorted
from pybtex.style.labels import BaseLabelStyle
from pybtex.style.sorting import BaseSortingStyle


def survey_number(key: str) -> int | None:
    """Return the survey's number that a key carries, as 100 for s100_xiao2024streaming."""
    match = re.match(r"s(\d+)_", key)
    return int(match.group(1)) if match else None


class SurveyLabels(BaseLabelStyle):
    def format_labels(self, sorted_entries):
        for entry in sorted_entries:
            number = survey_number(entry.key)
            yield str(number) if number else entry.fields["shorthand"]


class SurveyOrder(BaseSortingStyle):
    def sorting_key(self, entry):
        number = survey_number(entry.key)
        return (number is None, number or 0, entry.fields.get("shorthand", "").lower())


class SurveyStyle(Unsorted):
    default_label_style = SurveyLabels
    default_sorting_style = SurveyOrder


def setup(app):
    register_plugin("pybtex.style.formatting", "survey", SurveyStyle)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
