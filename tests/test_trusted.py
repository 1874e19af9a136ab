"""A folder of programs is one's own, and nobody else can put or replace any in it."""

import os
import stat

import jax
import pytest

from bigtrain.config import Refused
from bigtrain.program import enable_compilation_cache
from bigtrain.trusted import check_own


def test_a_folder_is_made_for_this_user_alone(tmp_path):
  check_own(tmp_path / "compiled", "")
  assert stat.S_IMODE((tmp_path / "compiled").stat().st_mode) == 0o700
  check_own(tmp_path / "compiled", "")


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
def test_a_folder_that_others_can_write_is_refused(tmp_path, mode):
  (tmp_path / "shared").mkdir()
  (tmp_path / "shared").chmod(mode)
  with pytest.raises(Refused, match=f"others can write to it \\(mode {mode:o}\\); do this"):
    check_own(tmp_path / "shared", "do this")


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(os, "geteuid", lambda: 12345)
  with pytest.raises(Refused, match=f"belongs to user {os.getuid()}, and this is user 12345"):
    check_own(tmp_path, "")


def test_a_folder_that_others_can_replace_is_refused_but_not_in_a_sticky_one(tmp_path):
  (tmp_path / "loose" / "own").mkdir(parents=True, mode=0o700)
  (tmp_path / "loose").chmod(0o777)
  with pytest.raises(Refused, match=r"others can replace it, as .*/loose is theirs to change"):
    check_own(tmp_path / "loose" / "own", "")
  (tmp_path / "loose").chmod(0o1777)
  check_own(tmp_path / "loose" / "own", "")


def test_a_link_is_looked_at_where_it_leads_and_where_it_lies(tmp_path):
  (tmp_path / "open").mkdir()
  (tmp_path / "open").chmod(0o777)
  (tmp_path / "link").symlink_to(tmp_path / "open")
  with pytest.raises(Refused, match="others can write"):
    check_own(tmp_path / "link", "")
  (tmp_path / "own").mkdir(mode=0o700)
  (tmp_path / "open" / "link").symlink_to(tmp_path / "own")
  with pytest.raises(Refused, match="others can replace it"):
    check_own(tmp_path / "open" / "link", "")


def test_every_link_on_the_way_is_looked_at(tmp_path):
  """link -> open/link -> own, where `open` is anyone's; also further up the path."""
  for name in ("open", "own"):
    (tmp_path / name).mkdir(mode=0o700)
  (tmp_path / "own" / "programs").mkdir(mode=0o700)
  (tmp_path / "open" / "link").symlink_to("../own")
  (tmp_path / "link").symlink_to(tmp_path / "open" / "link")
  for folder in (tmp_path / "link", tmp_path / "link" / "programs"):
    check_own(folder, "")
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(Refused, match=r"others can replace it, as .*/open is theirs to change"):
      check_own(folder, "")
    (tmp_path / "open").chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
def test_a_link_of_another_user_is_refused_where_only_its_owner_can_change_it(tmp_path):
  (tmp_path / "own").mkdir(mode=0o700)
  (tmp_path / "sticky").mkdir()
  (tmp_path / "sticky").chmod(0o1777)
  (tmp_path / "sticky" / "link").symlink_to(tmp_path / "own")
  check_own(tmp_path / "sticky" / "link", "")
  os.lchown(tmp_path / "sticky" / "link", 12345, 12345)
  with pytest.raises(Refused, match=r"others can replace it, as .*/link is theirs"):
    check_own(tmp_path / "sticky" / "link", "")


def test_what_cannot_be_made_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(Refused, match="cannot be made: Not a directory; do this"):
    check_own(tmp_path / "file" / "compiled", "do this")


def test_a_bucket_is_left_to_its_own_permissions():
  check_own("gs://bucket/compiled", "")


def test_no_program_is_read_from_a_cache_that_others_can_write(tmp_path):
  (tmp_path / "shared").mkdir()
  (tmp_path / "shared").chmod(0o777)
  before = jax.config.values["jax_compilation_cache_dir"]
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "shared"))
  try:
    with pytest.raises(Refused, match="set JAX_COMPILATION_CACHE_DIR to a folder of your own"):
      enable_compilation_cache()
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
