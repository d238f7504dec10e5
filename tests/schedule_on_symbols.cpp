// csrc/include/schedule.h on symbols: the machines below do what the kernel's do, on strings in place of registers.
//
// A value is written as the tree that it is: "(0 1)" for leaf 0 + leaf 1. A stage of the copy pipeline is a word: "k" and the leaf for the
// operands of one step, "v" and the slot for a parked value that comes back. What the producer puts into the pipeline and what the
// consumers take out of it must be the same words in the same order, or they wait for each other for ever.

#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/include/schedule.h"

using std::string;

struct Trace {
    string filled, taken, roots;
    size_t most = 0;  // positions of the stack in use, or slots
};

struct SymbolicProducer {
    Trace& trace;
    int steps;
    int in_scratch = 0;
    Parking due{0, false};

    void copy_step(const Unit& u, int leaf, int, int) { trace.filled += "k" + std::to_string(leaf) + "@" + std::to_string(u.tile) + " "; }
    void want(const Parking& after) { due = after; }
    void bring() {
        for (; due.unpark > 0; due.unpark--) trace.filled += "v" + std::to_string(--in_scratch) + " ";
        in_scratch += due.park;
        due.park = false;
    }
};

template <int kSplit>
struct SymbolicConsumer {
    Trace& trace;
    const Schedule& s;
    Leaves<kSplit>& leaves;
    std::vector<string> stack;  // parked, where they are
    string held, acc, sibling;

    string now() const { return std::to_string(leaves.unit.first + leaves.at.leaf); }
    void take() { trace.taken += "k" + now() + "@" + std::to_string(leaves.unit.tile) + " "; }
    void take_rest() { for (int i = 1; i < s.pieces * s.steps; i++) take(); }
    static void merge(string& x, string& pending) { x = "(" + pending + " " + x + ")", pending.clear(); }

    string& sum() { return acc; }
    string& second() { return sibling; }
    void begin() { acc = now(), take(); }
    void accumulate_rest() { take_rest(); }
    void complete() {}
    void settled() { sibling.clear(); }
    void move_to_second() { sibling = acc; }
    void accumulate_sibling() {
        sibling = now(), take(), take_rest();
        merge(sibling, acc);
    }
    void pop(string& x) {
        if (stack.empty()) throw std::runtime_error("nothing waits on the stack");
        merge(x, stack.back()), stack.pop_back();
    }
    void push(const string& x) {
        stack.push_back(x);
        if (stack.size() > trace.most) trace.most = stack.size();
    }
    void unpark(string& x) {
        trace.taken += "v" + std::to_string(stack.size() - 1) + " ";
        pop(x);
    }
    void park(const string& x) { push(x); }
    void merge_held(string& x) {
        if (held.empty()) throw std::runtime_error("nothing is held");
        merge(x, held);
    }
    void hold(const string& x) {
        if (!held.empty()) throw std::runtime_error("a held value is lost");
        held = x;
    }
    void finish(const string& x, const Leaf& done) {
        const Unit u = unit_at<kSplit>(s, done.index);
        if (!stack.empty() || !held.empty()) throw std::runtime_error("a value waits for ever");
        trace.roots += std::to_string(u.m) + "," + std::to_string(u.n) + "," + std::to_string(u.part) + " " + x + "\n";
    }
};

template <int kSplit, Waiting kWaiting, bool kDeep>
static Trace trace(const Schedule& s, int first_unit, int unit_step) {
    Trace trace;
    const int units = units_of<kSplit>(s);
    SymbolicProducer producer{trace, s.steps};
    produce<kSplit, kWaiting, kDeep, false>(s, units, first_unit, unit_step, producer);
    Leaves<kSplit> leaves(s, units, first_unit, unit_step);
    SymbolicConsumer<kSplit> consumer{trace, s, leaves};
    consume<kSplit, kWaiting, kDeep>(s, leaves, consumer);
    return trace;
}

template <int kSplit>
static Trace traced(const Schedule& s, int waiting, bool deep, int first_unit, int unit_step) {
    if (waiting == kInStack) return deep ? trace<kSplit, kInStack, true>(s, first_unit, unit_step) : trace<kSplit, kInStack, false>(s, first_unit, unit_step);
    if (waiting == kParked) return deep ? trace<kSplit, kParked, true>(s, first_unit, unit_step) : trace<kSplit, kParked, false>(s, first_unit, unit_step);
    return deep ? trace<kSplit, kHeldParked, true>(s, first_unit, unit_step) : trace<kSplit, kHeldParked, false>(s, first_unit, unit_step);
}

// What block `first_unit` of `unit_step` does: three lines (filled, taken, most) and a line for each root; or why it cannot be.
extern "C" const char* run(const Schedule* s, int split, int waiting, int deep, int first_unit, int unit_step) {
    static string text;
    try {
        Trace t = split == 1   ? traced<1>(*s, waiting, deep, first_unit, unit_step)
                  : split == 2 ? traced<2>(*s, waiting, deep, first_unit, unit_step)
                  : split == 4 ? traced<4>(*s, waiting, deep, first_unit, unit_step)
                               : traced<8>(*s, waiting, deep, first_unit, unit_step);
        text = t.filled + "\n" + t.taken + "\n" + std::to_string(t.most) + "\n" + t.roots;
    } catch (const std::runtime_error& error) {
        text = error.what();
    }
    return text.c_str();
}
