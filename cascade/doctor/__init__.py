"""What will not work, told before the money is spent: `cascade doctor RECIPE.yaml`.

    environment -> recipe -> data -> checkpoint -> memory          seconds, nothing is loaded
                -> engine -> first loss -> hours                   a model, a sampler, one MPO step

A check is a function that returns findings: what was found, with numbers, where, and the cure.
"""
