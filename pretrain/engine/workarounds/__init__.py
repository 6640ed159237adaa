"""One file for each fact about DeepSpeed that the engine works around.

Every file starts with the same five entries, from which documentation is made: ``Fact`` (what
DeepSpeed does), ``Versions`` (in which it was seen), ``Upstream`` (the issue there, if one is
known), ``Effect`` (what would go wrong in a training) and ``Test`` (which one fails once DeepSpeed
has changed, and the file can go).
"""
