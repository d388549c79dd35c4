"""How the threads of a process that computes wait for each other."""

# Without spinning: where other processes hold the cores, threads that spin while they wait take
# the time that those they wait for need. `python -m demo.measure` beside two other processes on two
# cores took 2 minutes so, and was not done after 6 minutes otherwise.
PATIENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}
