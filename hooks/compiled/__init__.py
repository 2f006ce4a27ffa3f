"""Reading attention inside `torch.compile`.

While a watcher is armed, compiled functions run a second version of themselves: Dynamo compiles it from the
same code with the same backend, and an operator that reads is inserted before each attention call. The
version that runs on other steps is the one that the user compiled, untouched.

    switch     chooses the version, and has graphs rewritten when they are compiled
    rewrite    inserts the operator (arguments: what it is given; reach: which node holds that)
    run        runs a graph on fake tensors under the eyes of the observer (graph: what is found)
    plan       what was found, without the tensors
    partition  keeps the operator from changing what Inductor makes of the rest
    operator   the operator: gives the tensors back to their plan
    reader     a watcher's part: whose call it is
    replay     reads a call as in eager mode (sites: with the answers that were found)
"""
