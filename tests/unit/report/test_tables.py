from minima.report.tables import markdown_table, text_table

ROWS = [("teacher", 134515008, 3.25), ("student", 54, None)]
HEADERS = ("model", "parameters", "loss")


def test_text_table_aligns_numbers_to_the_right():
    assert text_table(ROWS, HEADERS).splitlines() == [
        "model     parameters    loss",
        "-------  -----------  ------",
        "teacher  134,515,008  3.2500",
        "student           54       -",
    ]


def test_markdown_table_escapes_bars():
    assert markdown_table([("a|b", 1)], ("name", "n")).splitlines() == [
        "| name | n |",
        "| --- | ---: |",
        "| a\\|b | 1 |",
    ]


def test_a_table_without_rows_is_its_header():
    assert text_table([], ("model", "loss")).splitlines() == ["model  loss", "-----  ----"]
