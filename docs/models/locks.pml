/* The lock protocol: the law of the queue and the way it is kept, as in jef_daemon/lock/draft.py.
 *
 * N owners ask, ask again, cancel, release (all or one), die and come back at any moment, in any order: the
 * service must be right for every sequence of requests, so duplicates, reordering and lost requests are among
 * them. Answers get lost; who lost one asks again. Leases end at any moment, of grants and of waiting, and a
 * waiter's patience too: time is "whenever it hurts".
 *
 * spin -a           && cc -DSAFETY && ./pan                    every assertion in every state
 * spin -a -DFENCE   && cc -DSAFETY && ./pan                    with fencing numbers, FENCES of a resource or a few more
 * spin -a -DLIVE    && cc -DNFAIR=3 && ./pan -a -f -N served   nobody starves
 *
 * README.md says what this proves, its bounds, and what the mutations -DNO_A, -DNO_B, ... are for.
 */

#ifndef N
#define N 3                 /* owners */
#endif
#define R 2                 /* resources */
#ifndef K
#define K 2                 /* Limits.overtakes */
#endif
#ifndef FENCES
#define FENCES 2
#endif

#define NONE 9
#define S 1                 /* SHARED; 0 is "not" */
#define X 2                 /* EXCLUSIVE */
#define AT(o, r) ((o) * R + (r))
#define LINE(r, m) ((r) * 2 + (m) - 1)

/* What the service stores. */
byte held[N * R];           /* mode in which an owner holds a resource */
byte want[N * R];           /* mode in which a waiter wants it; 0 when it does not wait */
byte queue[N];              /* waiting owners in the order of tickets */
byte waiters = 0;
bool waiting[N];
byte at[N];                 /* blocked_at */
byte overtaken[N];
bool firm[N];

/* What the owners know: an answer on its way, and whether they believe that they hold. */
bool mail[N];
bool believes[N];

#ifdef FENCE
byte fence[R];
byte number[N * R];         /* of the grant that is stored */
byte token[N * R];          /* the number an owner believes in, also when its lease is long over */
byte accepted[R];           /* the highest number that the store which the lock protects has seen */
#endif

/* Scratch of the one atomic step that runs; reset so that it does not tell states apart. */
hidden byte i, j, r, m, w, b, p, first;
hidden byte blocked, shared, exclusive, fits;
hidden byte asked[R];
hidden byte passed[N], ended[R * 2], freed[R];

/* blocked: is a request that wants `res` in `mode`, behind the first `before` waiters, blocked there?
 * first: the first of these that excludes it. */
inline check(res, mode, before) {
    shared = false; exclusive = false; first = NONE;
    i = 0;
    do
    :: i < N ->
        shared = shared || held[AT(i, res)] == S;
        exclusive = exclusive || held[AT(i, res)] == X;
        i++
    :: else -> break
    od;
#ifdef NO_A
    blocked = false;
#else
    blocked = exclusive || (shared && mode == X);                               /* (a) */
#endif
    i = 0;
    do
    :: i < before ->
        w = queue[i];
        if
        :: want[AT(w, res)] && (want[AT(w, res)] == X || mode == X) ->
            first = (first == NONE -> w : first);
#ifndef NO_B
            blocked = blocked || (shared && want[AT(w, res)] == X);             /* (b) */
#endif
#ifndef NO_C
            blocked = blocked || firm[w];                                       /* (c) */
#endif
        :: else
        fi;
        i++
    :: else -> break
    od
}

/* b: the first of the resources in asked[] at which it is blocked, or NONE. passed[]: whom it would overtake. */
inline obstacle(before) {
    b = NONE;
    j = 0;
    do :: j < N -> passed[j] = false; j++ :: else -> break od;
    j = 0;
    do
    :: j < R && asked[j] ->
        check(j, asked[j], before);
        assert(blocked || first == NONE || !(shared || exclusive));     /* only what is free is overtaken */
        b = (blocked && b == NONE -> j : b);
        if :: first != NONE -> passed[first] = true :: else fi;
        j++
    :: j < R && !asked[j] -> j++
    :: else -> break
    od
}

inline grant(o) {
    j = 0;
    do
    :: j < N ->
        if
        :: passed[j] ->
            assert(!firm[j]);                          /* a firm waiter is never overtaken */
#ifndef NO_COUNT
            overtaken[j]++;
            firm[j] = overtaken[j] >= K;
#endif
        :: else
        fi;
        j++
    :: else -> break
    od;
    j = 0;
    do
    :: j < R ->
        held[AT(o, j)] = asked[j];
#ifdef FENCE
        if
        :: asked[j] ->
#ifndef NO_RISE
            fence[j]++;
#endif
            i = 0;
            do
            :: i < N -> assert(token[AT(i, j)] < fence[j]); i++     /* numbers only rise */
            :: else -> break
            od;
            assert(accepted[j] < fence[j]);                         /* so an older one is told from it */
            number[AT(o, j)] = fence[j]
        :: else
        fi;
#endif
        asked[j] = 0; j++
    :: else -> break
    od;
    mail[o] = true
}

/* Takes the waiter at a position out of the queue. */
inline leave(position) {
    w = queue[position];
    waiting[w] = false; firm[w] = false; overtaken[w] = 0; at[w] = 0;
    j = 0;
    do :: j < R -> want[AT(w, j)] = 0; j++ :: else -> break od;
    j = position;
    do :: j + 1 < waiters -> queue[j] = queue[j + 1]; j++ :: else -> break od;
    waiters--; queue[waiters] = 0
}

/* Grants in the order of tickets, looking only at who waits where something was freed. */
inline sweep() {
#ifndef NO_SWEEP
    p = 0;
    do :: p < R * 2 -> ended[p] = false; p++ :: else -> break od;
    p = 0;
    do
    :: p < waiters ->
        r = at[queue[p]]; m = want[AT(queue[p], r)];
        if
        :: freed[r] && !ended[LINE(r, m)] ->
            check(r, m, p);
            if
            :: blocked -> ended[LINE(r, m)] = true; p++
            :: else ->
                j = 0;
                do :: j < R -> asked[j] = want[AT(queue[p], j)]; j++ :: else -> break od;
                obstacle(p);
                if
                :: b == NONE -> m = queue[p]; leave(p); grant(m)
#ifdef NO_MOVE
                :: else -> p++
#else
                :: else -> at[queue[p]] = b; p++
#endif
                fi
            fi
        :: else -> p++
        fi
    :: else -> break
    od;
#endif
    r = 0;
    do :: r < R -> freed[r] = false; asked[r] = 0; r++ :: else -> break od;
    lawful()
}

/* What holds after every decision. */
inline lawful() {
    r = 0;
    do
    :: r < R ->
        p = 0; m = 0;
        do
        :: p < N ->
            m = m + (held[AT(p, r)] -> 1 : 0) + (held[AT(p, r)] == X -> 10 : 0);
            assert(!(waiting[p] && held[AT(p, r)]));                /* who waits holds nothing */
            p++
        :: else -> break
        od;
        assert(m < 10 || m == 11);                                  /* many SHARED or one EXCLUSIVE */
        r++
    :: else -> break
    od;
    p = 0; m = 0;
    do
    :: p < waiters ->
        assert(waiting[queue[p]]);                                  /* nobody is lost */
        assert(want[AT(queue[p], at[queue[p]])]);
        check(at[queue[p]], want[AT(queue[p], at[queue[p]])], p);
        assert(blocked);                  /* nobody waits for what is free, and a change there wakes it */
        p++
    :: else -> break
    od;
    p = 0;
    do :: p < N -> m = m + (waiting[p] -> 1 : 0); p++ :: else -> break od;
    assert(m == waiters);
    i = 0; j = 0; r = 0; m = 0; w = 0; b = 0; p = 0; first = 0;
    blocked = false; shared = false; exclusive = false; fits = false
}

/* --- requests -------------------------------------------------------------------------------------- */

/* Asks for x and y in these modes. Who holds or waits already changes nothing by asking again. */
inline acquire(o, x, y) {
    d_step {
        if
        :: held[AT(o, 0)] || held[AT(o, 1)] ->
            fits = held[AT(o, 0)] >= x && held[AT(o, 1)] >= y;
            mail[o] = mail[o] || fits                               /* granted: told again */
        :: waiting[o]                                               /* told its place again, or refused */
        :: else ->
            asked[0] = x; asked[1] = y;
            obstacle(waiters);
            if
            :: b == NONE -> grant(o)
            :: else ->
                want[AT(o, 0)] = x; want[AT(o, 1)] = y;
                queue[waiters] = o; waiters++; waiting[o] = true; at[o] = b
            fi
        fi;
        sweep()                                                     /* nothing freed: only the assertions */
    }
}

inline give_up(o, x, y) {
    d_step {
        freed[0] = x && held[AT(o, 0)]; freed[1] = y && held[AT(o, 1)];
        if :: x -> held[AT(o, 0)] = 0 :: else fi;
        if :: y -> held[AT(o, 1)] = 0 :: else fi;
#ifdef FENCE
        if :: x -> number[AT(o, 0)] = 0 :: else fi;
        if :: y -> number[AT(o, 1)] = 0 :: else fi;
#endif
        sweep()
    }
}

inline go(o) {
    d_step {
        p = 0;
        do :: queue[p] != o -> p++ :: else -> break od;
        freed[0] = want[AT(o, 0)]; freed[1] = want[AT(o, 1)];
        leave(p);
        sweep()
    }
}

#define holds(o) (held[AT(o, 0)] || held[AT(o, 1)])

#ifdef FENCE
#define MAY_ASK (fence[0] < FENCES && fence[1] < FENCES)
#else
#define MAY_ASK true
#endif

/* The property `served` is about owner 0: it waits until it is granted. */
#ifdef LIVE
#define STAYS(o) (o == 0)
#else
#define STAYS(o) false
#endif

proctype Owner(byte o) {
    byte x, y;
end:
    do
    :: atomic { MAY_ASK && !believes[o] ->
            select(x : 0 .. X); select(y : 0 .. X);
            if :: x || y -> acquire(o, x, y) :: else fi;
            x = 0; y = 0 }
    :: atomic { mail[o] -> mail[o] = false;
            believes[o] = true;                                     /* true or not: the lease may be over */
#ifdef FENCE
            token[AT(o, 0)] = (held[AT(o, 0)] -> number[AT(o, 0)] : token[AT(o, 0)]);
            token[AT(o, 1)] = (held[AT(o, 1)] -> number[AT(o, 1)] : token[AT(o, 1)]);
#endif
        }
    :: atomic { mail[o] -> mail[o] = false }                        /* the answer is lost */
    :: atomic { believes[o] && holds(o) -> believes[o] = false; give_up(o, 1, 1) }
#ifndef LIVE
    :: atomic { holds(o) -> give_up(o, 1, 0) }                      /* one of two, or a late duplicate */
    :: atomic { holds(o) -> give_up(o, 0, 1) }
#endif
    :: atomic { waiting[o] && !STAYS(o) -> go(o) }                  /* cancels */
    :: atomic { believes[o] -> believes[o] = false }                /* dies, or its release is lost */
#ifdef FENCE
    :: atomic { believes[o] && token[AT(o, 0)] > accepted[0] -> accepted[0] = token[AT(o, 0)] }
    :: atomic { believes[o] && token[AT(o, 1)] > accepted[1] -> accepted[1] = token[AT(o, 1)] }
#endif
    od
}

/* Leases, one process for each owner, so that fairness means: each one ends some time. */
proctype Lease(byte o) {
end:
    do
    :: atomic { holds(o) -> give_up(o, 1, 1) }
#ifndef LIVE
    :: atomic { waiting[o] -> go(o) }
    :: atomic { waiting[o] && !firm[o] -> firm[o] = true }          /* its patience is over */
#endif
    od
}

init {
    byte o = 0;
    atomic {
        do :: o < N -> run Owner(o); run Lease(o); o++ :: else -> break od;
        o = 0
    }
}

#ifdef LIVE
ltl served { [] (waiting[0] -> <> !waiting[0]) }
#endif
