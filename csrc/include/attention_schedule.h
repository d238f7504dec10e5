// Which tile comes next, what its rows see, and in which order a warpgroup takes keys and values: plain C++, so that g++ tests it.
//
// Sequences are cut into blocks of 64 keys from their own first key. A tile is 128 queries of one head, 64 for each of two warpgroups.
#pragma once

#ifdef __CUDACC__
#define SCHEDULE_CALL __host__ __device__ __forceinline__
#else
#define SCHEDULE_CALL inline
#endif

constexpr int kBlock = 64;     // keys
constexpr int kGroupRows = 64; // queries of a warpgroup

struct Grid {
    int heads, sequences;  // query heads; batch, or sequences of a pack
    int tiles;             // of the longest sequence
    int section;           // heads (of all sequences) that are worked on together, so that their keys stay in the L2 cache
};

struct TileIndex {
    int tile, head, sequence;
};

SCHEDULE_CALL int tile_count(const Grid& g) { return g.heads * g.sequences * g.tiles; }

// Section after section; in a section the tiles with the most keys first, of all its heads.
SCHEDULE_CALL TileIndex tile_at(const Grid& g, int item) {
    const int all = g.heads * g.sequences, size = g.section * g.tiles;
    const int first = item / size * g.section, here = all - first < g.section ? all - first : g.section;
    const int rank = item % size, flat = first + rank % here;
    return {g.tiles - 1 - rank / here, flat % g.heads, flat / g.heads};
}

// Of the 64 rows from `row` on: how many blocks of keys any of them sees, and how many from the first on all of them see whole.
struct Reach {
    int blocks, whole;
};

SCHEDULE_CALL Reach reach(int row, int queries, int keys, bool causal) {
    if (row >= queries) return {0, 0};
    int end = keys, whole = keys / kBlock;
    if (causal) {
        const int sees = row + keys - queries + 1;  // keys of the first row
        const int last = sees + kGroupRows - 1;
        end = last < keys ? last : keys;
        if (sees / kBlock < whole) whole = sees / kBlock;
    }
    if (end <= 0) return {0, 0};
    return {(end + kBlock - 1) / kBlock, whole > 0 ? whole : 0};
}

// The copies of a tile of n > 0 blocks, in order: K0 K1 V0 K2 V1 ... K(n-1) V(n-2) V(n-1). Scores of a block are computed before the
// values of the one before it are used.
struct Copy {
    int block;
    bool values;
};

SCHEDULE_CALL Copy copy_at(int n, int position) {
    if (position == 0) return {0, false};
    if (position == 2 * n - 1) return {n - 1, true};
    return position % 2 ? Copy{(position + 1) / 2, false} : Copy{position / 2 - 1, true};
}

// What a warpgroup does with its own `own` blocks of a tile's `all`. The machine has
//     turn_begin(), turn_end()       around what is given to the tensor cores
//     scores(block), settle(block)   issues the product of a block's keys; waits for it and turns it into weights. settle_first: of block 0
//     accumulate(block), complete()  issues the product of its weights and values; waits for it
//     proceed(block)                 waits likewise, then merges or rescales what was summed before the block
//     skip(count)                    lets that many copies pass
template <class Machine>
SCHEDULE_CALL void walk_blocks(int own, int all, Machine& m) {
    int turns = all + 1, left = 2 * all;  // what it takes no part in
    if (own > 0) {
        turns = all - own, left = 2 * turns;
        m.turn_begin();
        m.scores(0);
        m.turn_end();
        m.settle_first();
        for (int block = 0; block + 1 < own; block++) {
            m.turn_begin();
            m.scores(block + 1);
            m.accumulate(block);
            m.turn_end();
            m.settle(block + 1);
            m.proceed(block + 1);
        }
        if (left > 0) m.skip(1), left--;
        m.turn_begin();
        m.accumulate(own - 1);
        m.turn_end();
        m.complete();
    }
    for (int turn = 0; turn < turns; turn++) {  // copies pass as the other takes its turns: it needs the slots
        m.turn_begin();
        m.turn_end();
        m.skip(left < 2 ? left : 2);
        left -= left < 2 ? left : 2;
    }
    m.skip(left);
}
