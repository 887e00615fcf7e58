import pytest

from fintune.finqa.identity import LEVELS, group_of


@pytest.mark.parametrize(
    ("record_id", "groups"),
    [
        ("ETR/2009/page_107.pdf-2", ("ETR/2009/page_107.pdf", "ETR/2009", "ETR")),
        ("A-B/2009/page_1.pdf-D12", ("A-B/2009/page_1.pdf", "A-B/2009", "A-B")),
        ("page-3", ("page", "page", "page")),
        ("ACME/page-3", ("ACME/page", "ACME", "ACME")),
        ("plain", ("plain", "plain", "plain")),
    ],
)
def test_an_id_names_page_report_and_company(record_id: str, groups: tuple[str, ...]) -> None:
    assert tuple(group_of(record_id, level) for level in LEVELS) == groups
