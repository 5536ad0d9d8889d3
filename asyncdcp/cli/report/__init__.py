"""The page of ``asyncdcp report``: what is on it (``content``), pictures (``charts``) and template."""
