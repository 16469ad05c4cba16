"""Files that scripts leave."""

import csv

from scripts.common import report


def rows_in(path):
  with path.open(newline="") as file:
    return list(csv.DictReader(file))


def test_rows_of_an_earlier_run_stay_where_they_are_not_written_again(tmp_path):
  path = tmp_path / "results.csv"
  report.write_csv(path, [{"method": "a", "seed": 0, "loss": 1.5}, {"method": "b", "seed": 0}])
  assert rows_in(path) == [
    {"method": "a", "seed": "0", "loss": "1.5"},
    {"method": "b", "seed": "0", "loss": ""},
  ]
  later = [{"method": "b", "seed": 0, "loss": 2.5}, {"method": "b", "seed": 1, "gain": 3}]
  report.write_csv(path, later, kept_by=("method", "seed"))
  assert rows_in(path) == [
    {"method": "a", "seed": "0", "loss": "1.5", "gain": ""},
    {"method": "b", "seed": "0", "loss": "2.5", "gain": ""},
    {"method": "b", "seed": "1", "loss": "", "gain": "3"},
  ]
  report.write_csv(path, later[1:])
  assert rows_in(path) == [{"method": "b", "seed": "1", "gain": "3"}]
  assert list(tmp_path.iterdir()) == [path]


def test_without_an_earlier_run_or_rows_there_is_a_file_all_the_same(tmp_path):
  path = tmp_path / "results.csv"
  report.write_csv(path, [], kept_by=("method",))
  assert path.read_text().strip() == ""
  report.write_csv(path, [{"method": "a"}], kept_by=("method",))
  assert rows_in(path) == [{"method": "a"}]
