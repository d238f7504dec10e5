// What is computed in which order: which tile and which leaves a unit is, what is merged after a leaf, what waits where.
//
// Plain C++ without a header: compiled into sm90_tree_gemm.cu for the GPU, and by g++ into a test that runs it on symbols
// (tests/schedule_on_symbols.cpp). Nothing here knows a number or an address; what is done is the Machine's to do.
//
// The tree itself is not here either. tpinv/tree.py says, for every leaf, how many pending values are merged after it
// (ReductionTree.merges); the host passes that table, for whole tiles and for the parts of split ones.
#pragma once

#ifdef __CUDACC__
#define SCHEDULED __device__ __forceinline__
#else
#define SCHEDULED inline
#endif

constexpr int kMaxLeaves = 64;

struct Schedule {
    int rows, cols;               // of the output
    int leaves, pieces, steps;    // a leaf is `pieces` runs of `steps` stages
    int tiles_m, tiles_n;         // tiles_m counts clusters
    int whole;                    // tiles before this one are not split
    int group;                    // tile rows that share their columns in L2
    unsigned char merges[kMaxLeaves];       // after leaf i of a whole tile: the newest pending values that are merged into it,
    unsigned char part_merges[kMaxLeaves];  // and of a part
};

// Where a value waits for what it is merged with.
enum Waiting {
    kInStack,    // a left leaf in its accumulators, where its sibling finds it; all else on a stack in registers and memory
    kParked,     // the same, but all else is parked: it comes back through the copy pipeline, so the producer must foresee it
    kHeldParked  // one value is held at hand, that which the next leaf is merged with; all else is parked
};

// A unit of work: a tile, or one of `kSplit` subtrees of a tile of the last partial wave.
struct Unit { int m, n, tile, part, first, last; };  // tile row and column, their number, the subtree, its leaves

template <int kSplit>
SCHEDULED int units_of(const Schedule& s) { return s.whole + (s.tiles_m * s.tiles_n - s.whole) * kSplit; }

template <int kSplit>
SCHEDULED Unit unit_at(const Schedule& s, int index) {
    Unit u;
    u.tile = index, u.part = 0, u.first = 0, u.last = s.leaves;
    if (kSplit > 1 && index >= s.whole) {
        u.tile = s.whole + (index - s.whole) / kSplit;
        u.part = (index - s.whole) % kSplit;
        u.first = u.part * (s.leaves / kSplit);
        u.last = u.first + s.leaves / kSplit;
    }
    const int band = u.tile / (s.group * s.tiles_n), inside = u.tile % (s.group * s.tiles_n);
    const int left = s.tiles_m - band * s.group, height = left < s.group ? left : s.group;
    u.m = band * s.group + inside % height;
    u.n = inside / height;
    return u;
}

// A leaf of a unit that this block computes: the unit's number, the leaf's place in it, whether it is the unit's last.
struct Leaf { int index, leaf; bool last; };

template <int kSplit>
SCHEDULED int merges_after(const Schedule& s, int index, int leaf) {
    return kSplit > 1 && index >= s.whole ? s.part_merges[leaf] : s.merges[leaf];
}

// What is done with parked values after a leaf: from the table alone, so that producer and consumers agree.
struct Parking { int unpark; bool park; };  // values that come back to be merged; whether the result is then parked

template <int kSplit, Waiting kWaiting>
SCHEDULED Parking parking_after(const Schedule& s, int index, int leaf, bool last) {
    const int count = merges_after<kSplit>(s, index, leaf);
    if constexpr (kWaiting == kHeldParked)  // the first merge is with the held value; the result is held if the next leaf is merged with it
        return {count > 0 ? count - 1 : 0, !last && merges_after<kSplit>(s, index, leaf + 1) == 0};
    // a left leaf waits in its accumulators, and the first merge of the next one is with it
    if (count == 0 && !last) return {0, false};
    return {count - (leaf > 0 && merges_after<kSplit>(s, index, leaf - 1) == 0 ? 1 : 0), !last};
}

// The leaves of a block, unit by unit.
template <int kSplit>
struct Leaves {
    const Schedule& s;
    int units, unit_step;
    Unit unit;
    Leaf at;  // the leaf in hand

    SCHEDULED Leaves(const Schedule& schedule, int units, int first_unit, int unit_step)
        : s(schedule), units(units), unit_step(unit_step), unit(unit_at<kSplit>(schedule, first_unit)),
          at{first_unit, 0, unit.first + 1 == unit.last} {}
    SCHEDULED bool advance() {  // to the next leaf; false at the end
        if (at.last) {
            at.index += unit_step;
            if (at.index >= units) return false;
            unit = unit_at<kSplit>(s, at.index);
            at.leaf = -1;
        }
        at.leaf++;
        at.last = unit.first + at.leaf + 1 == unit.last;
        return true;
    }
};

// What becomes of a value x after its leaf: it is merged with `count` pending values, the newest first (a pending value is the left
// operand: it lies left in the tree); then it waits in turn, or it is the unit's root.
template <int kSplit, Waiting kWaiting, bool kDeep, class Value, class Machine>
SCHEDULED void settle(const Schedule& s, Machine& machine, Value& x, int count, const Leaf& done) {
    if constexpr (kDeep && kWaiting == kInStack) {
        for (; count > 0; count--) machine.pop(x);
        if (!done.last) return machine.push(x);
    } else if constexpr (kDeep) {
        const Parking after = parking_after<kSplit, kWaiting>(s, done.index, done.leaf, done.last);
        if constexpr (kWaiting == kHeldParked)
            if (count > 0) machine.merge_held(x);
        for (int i = 0; i < after.unpark; i++) machine.unpark(x);
        if (after.park) return machine.park(x);
        if constexpr (kWaiting == kHeldParked)
            if (!done.last) return machine.hold(x);
    }
    machine.finish(x, done);
}

// Where a left leaf waits in its accumulators, `sum()`: its sibling, which is the next leaf, is accumulated in the second set, and what
// comes of the two is settled there while the tensor cores are busy with the leaf after it.
template <int kSplit, Waiting kWaiting, bool kDeep, class Machine>
SCHEDULED void consume_pairs(const Schedule& s, Leaves<kSplit>& leaves, Machine& machine) {
    machine.begin();
    machine.accumulate_rest();
    while (true) {
        int count = merges_after<kSplit>(s, leaves.at.index, leaves.at.leaf);
        if (count == 0 && !leaves.at.last) {  // a left leaf: in the contract's tree the next leaf is its sibling
            leaves.advance();
            count = merges_after<kSplit>(s, leaves.at.index, leaves.at.leaf) - 1;
            machine.accumulate_sibling();
        } else {
            machine.complete();
            machine.move_to_second();
        }
        const Leaf done = leaves.at;
        if (!leaves.advance()) {
            settle<kSplit, kWaiting, kDeep>(s, machine, machine.second(), count, done);
            return;
        }
        machine.begin();
        settle<kSplit, kWaiting, kDeep>(s, machine, machine.second(), count, done);
        machine.settled();
        machine.accumulate_rest();
    }
}

// A consumer's work on all leaves of its block.
template <int kSplit, Waiting kWaiting, bool kDeep, class Machine>
SCHEDULED void consume(const Schedule& s, Leaves<kSplit>& leaves, Machine& machine) {
    if constexpr (kWaiting == kHeldParked) {
        do {
            machine.begin();
            machine.accumulate_rest();
            machine.complete();
            settle<kSplit, kWaiting, kDeep>(s, machine, machine.sum(), merges_after<kSplit>(s, leaves.at.index, leaves.at.leaf), leaves.at);
        } while (leaves.advance());
    } else {
        consume_pairs<kSplit, kWaiting, kDeep>(s, leaves, machine);
    }
}

// The producer's: the stages of every leaf, and behind a stage of the next leaf, which the consumers begin before they settle, what they
// then want brought back. With kHeldParked they settle first.
template <int kSplit, Waiting kWaiting, bool kDeep, bool kAccumulate, class Machine>
SCHEDULED void produce(const Schedule& s, int units, int first_unit, int unit_step, Machine& machine) {
    for (int index = first_unit; index < units; index += unit_step) {
        const Unit u = unit_at<kSplit>(s, index);
        for (int leaf = u.first; leaf < u.last; leaf++) {
            for (int piece = 0; piece < s.pieces; piece++)
                for (int step = 0; step < s.steps; step++) {
                    machine.copy_step(u, leaf, piece, step);
                    machine.bring();
                }
            if constexpr (kAccumulate)
                machine.want(u);
            else if constexpr (kWaiting != kInStack && kDeep)
                machine.want(parking_after<kSplit, kWaiting>(s, index, leaf - u.first, leaf + 1 == u.last));
            if (kWaiting == kHeldParked) machine.bring();
        }
    }
    machine.bring();
}
