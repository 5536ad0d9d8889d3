"""The page of ``asyncdcp report``: what is on it (``content``), pictures (``charts``, ``treemap``) and template."""
