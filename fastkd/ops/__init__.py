"""One file per operator family: its schema, its fake and its autograd Function.

Every kernel backend registers the same schemas in a namespace of its own (``fastkd_cpu``, ``fastkd_triton``), so that a
backend can be chosen per call and compared with another in one process.
"""
