"""One page of a study: what was run, what came out, and how to run it again."""

from sqap.report.study.media import Media, Picture, Video, record
from sqap.report.study.page import write_page

__all__ = ["Media", "Picture", "Video", "record", "write_page"]
