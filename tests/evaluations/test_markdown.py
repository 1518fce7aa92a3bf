from evaluations.markdown import table


def test_table():
    told = "| cache | s |\n|---|---|\n| dense | 2 |\n| adsa |  |"
    assert table(["cache", "s"], [["dense", "2"], ["adsa", ""]]) == told
    assert table(["cache"], []) == "| cache |\n|---|"


def test_line_under_the_titles():
    columns = ["cache", "ms", "MiB"]
    assert table(columns, [], right=2).splitlines()[1] == "|---|---:|---:|"
