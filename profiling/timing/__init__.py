"""A timing model of SMs: what kernels take without the hardware, from their machine code and the emulator.

    decode      machine code with its control bits
    words       what an instruction does that PTX and machine code both show
    trace       what each warp does and whom it meets, as the emulator runs the PTX
    match       that laid over the machine code
    constants   every number, with source and confidence
    costs       what a line of machine code asks of the machine
    joins       meetings of warps and units
    parts       SMs, schedulers, warps
    machine     these, clock by clock
    subjects    forward kernels: ours and flash-attn-4's
    backward    and backward ones
    simulate    all of these for one kernel
    grid        from the clocks of a CTA to those of a launch
    predict     samples of a CTA, put together for a grid
    published   speeds that others published
    validate    predictions beside them
    kept        what is kept in results/timing.json
    table       the command `python -m profiling timing`
    timeline    the command `python -m profiling timeline`
    tune        the command `python -m profiling tune`
"""
