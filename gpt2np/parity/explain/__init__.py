"""Why an operation differs: the usual mistakes of porting a transformer, tried one by one.

problem.py             what is to be explained (`Problem`) and one explanation of it (`Guess`)
mistakes.py            the catalogue: embedding, norms, linear maps, activation, head, other inputs
attention_mistakes.py  the catalogue: c_attn and its heads, scale, mask, softmax, merge
rounding_mistakes.py   the catalogue: narrower types
solve.py               weights that are solved for: one element, a bias
gradients.py           reverse mode through the operations, which `solve` needs
evidence.py            what the error shows and what the file shows
rank.py                all guesses, tried and ranked
diagnose.py            from a located difference to ranked causes
"""
