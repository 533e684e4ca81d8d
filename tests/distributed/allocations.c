/* Counts what this process has allocated, and the most at once: preloaded, for glibc. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
static atomic_long used, peak;
extern void *__libc_malloc(size_t), __libc_free(void *), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);
static void add(void *p) { if (!p) return; long now = atomic_fetch_add(&used, malloc_usable_size(p)) + malloc_usable_size(p); long top = atomic_load(&peak); while (now > top && !atomic_compare_exchange_weak(&peak, &top, now)); }
static void sub(void *p) { if (p) atomic_fetch_sub(&used, malloc_usable_size(p)); }
void *malloc(size_t n) { void *p = __libc_malloc(n); add(p); return p; }
void free(void *p) { sub(p); __libc_free(p); }
void *calloc(size_t a, size_t b) { void *p = __libc_calloc(a, b); add(p); return p; }
void *realloc(void *p, size_t n) { sub(p); void *q = __libc_realloc(p, n); if (q) add(q); else if (n) add(p); return q; }
void *memalign(size_t a, size_t n) { void *p = __libc_memalign(a, n); add(p); return p; }
void *aligned_alloc(size_t a, size_t n) { return memalign(a, n); }
int posix_memalign(void **out, size_t a, size_t n) { void *p = memalign(a, n); if (!p) return 12; *out = p; return 0; }
long counted_bytes(void) { return atomic_load(&used); }
long counted_peak(void) { return atomic_load(&peak); }
void counted_reset(void) { atomic_store(&peak, atomic_load(&used)); }
