"""Which experts fire for which text: a model's gates, watched while it reads.

    texts.py      files to domains, each a name and its documents
    watch.py      runs the model over them, in this process, and notes what every gate chose  -> Reading
    findings.py   readings to figures, layer by layer                                         -> Findings
    typical.py    the tokens that an expert gets more often than others do
    twins.py      experts that hardly differ
    page.py       findings as one HTML page; pictures.py and palette.py draw, report.html.j2 and report.css are its look

Needs no mesh and changes no answer: the model is transformers' own, whole. Numbers of layers and experts are those of
the mesh: layer n is the n-th MoE layer.
"""
