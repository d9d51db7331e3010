"""Is a file there whole or not at all, and is nothing else left beside it?"""

import pytest

import files


def test_what_could_not_be_written_leaves_nothing(tmp_path):
  (tmp_path / 'directory').mkdir()
  for write in (
    lambda: files.replace(tmp_path / 'directory', 'x'),
    lambda: files.check_writable(tmp_path / 'directory'),
  ):
    with pytest.raises(IsADirectoryError, match='directory'):
      write()
  with pytest.raises(UnicodeEncodeError):
    files.replace(tmp_path / 'file', '\ud800')
  assert [path.name for path in tmp_path.iterdir()] == ['directory']


def test_to_ask_whether_one_could_write_changes_nothing(tmp_path):
  files.replace(tmp_path / 'new' / 'file', 'old')
  files.check_writable(tmp_path / 'new' / 'file')
  files.check_writable(tmp_path / 'new' / 'other')
  assert [(path.name, path.read_text()) for path in (tmp_path / 'new').iterdir()] == [
    ('file', 'old')
  ]
