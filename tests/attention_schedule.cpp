// What csrc/include/attention_schedule.h says, for test_attention_schedule.py.
#include <cstdio>
#include <string>

#include "../csrc/include/attention_schedule.h"

struct Machine {  // writes down what it is told; copies are named as copy_at names them
    int all, position = 0, held = -1, turns = 0;
    std::string said;
    std::string next() {
        if (position >= 2 * all) return "beyond";
        const Copy c = copy_at(all, position++);
        return (c.values ? "V" : "K") + std::to_string(c.block);
    }
    void say(const std::string& what) { said += what + "\n"; }
    void turn_begin() { say("begin"); }
    void turn_end() { turns++, say("end"); }
    void scores(int block) { say("scores " + std::to_string(block) + " " + next()); }
    void settle_first() { say("settle 0"); }
    void settle(int block) { say("settle " + std::to_string(block)); }
    void accumulate(int block) { say("accumulate " + std::to_string(block) + " " + next()); }
    void complete() { say("complete"); }
    void proceed(int block) { say("proceed " + std::to_string(block)); }
    void skip(int count) {
        for (; count > 0; count--) say("skip " + next());
    }
};

extern "C" {
const char* walk(int own, int all) {
    static std::string text;
    Machine m{all};
    walk_blocks(own, all, m);
    text = std::to_string(m.position) + " " + std::to_string(m.turns) + "\n" + m.said;
    return text.c_str();
}
void find_reach(int row, int queries, int keys, int causal, int* out) {
    const Reach r = reach(row, queries, keys, causal != 0);
    out[0] = r.blocks, out[1] = r.whole;
}
void find_tile(int heads, int sequences, int tiles, int section, int item, int* out) {
    const TileIndex t = tile_at(Grid{heads, sequences, tiles, section}, item);
    out[0] = t.tile, out[1] = t.head, out[2] = t.sequence;
}
}
