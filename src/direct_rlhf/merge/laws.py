"""The laws that a merge may obey, by name. Each method says which it does; a test holds it to them, and finds a
counterexample to each of the others."""

LAWS = {
    "order": "the order of the experts changes nothing, to the last bit",
    "base": "experts equal to the base give the base, to the last bit",
    "zero": "scale 0 gives the base to the last bit, and so do weights 0",
    "shift": "adding X to the base and to every expert adds X",
    "one": "one expert gives that expert (neutral settings)",
    "equal": "equal experts give that expert (neutral settings)",
    "scaling": "c > 0 times the differences gives c times the change",
    "negation": "the negated differences give the negated change",
    "linear": "the change is linear in the differences",
}
HOMOGENEOUS = frozenset(LAWS) - {"one", "equal", "linear"}  # what all methods on differences but PCB obey
